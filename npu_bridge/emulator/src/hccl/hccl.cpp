// libhccl: communicators and collectives.
#include <hccl/hccl.h>

#include "runtime/runtime.h"
