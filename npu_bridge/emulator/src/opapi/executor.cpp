// A first phase that no second one follows: torch_npu asks a captured call for its largest workspace, then drops what came with it.
#include "opapi/operator.h"

EMULATED int aclDestroyAclOpExecutor(aclOpExecutor* executor) {
  delete executor;
  return 0;
}
