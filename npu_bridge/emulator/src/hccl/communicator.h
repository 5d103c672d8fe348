// A communicator, for the collectives of libhccl and for the operators that join a product with an exchange (libopapi).
#pragma once

#include <hccl/hccl.h>

#include "hccl/transport.h"

namespace emulator {

struct Communicator {
  std::string name, root;
  std::unique_ptr<Transport> transport;
  std::atomic<uint64_t> calls{0};
  std::atomic<bool> failed{false};
  std::vector<void*> buffers;  // what the real library takes from the device for its exchanges
  uint32_t subgroups = 0;

  uint32_t rank() const { return transport->rank; }
  uint32_t size() const { return transport->size; }
};

// The communicator that HcclGetCommName names. Throws Refusal when there is none in this process.
Communicator& communicator(const std::string& name);

// The exchanges themselves; they block. Offsets and counts are elements of `type`.
void all_reduce(Communicator&, const void* send, void* receive, uint64_t count, HcclDataType type, HcclReduceOp op);
void reduce_scatter(Communicator&, const void* send, void* receive, uint64_t receive_count, HcclDataType type, HcclReduceOp op);
void all_gather(Communicator&, const void* send, void* receive, uint64_t send_count, HcclDataType type);
void all_to_all(Communicator&, const void* send, const std::vector<uint64_t>& send_counts, const std::vector<uint64_t>& send_offsets, HcclDataType send_type,
                void* receive, const std::vector<uint64_t>& receive_counts, const std::vector<uint64_t>& receive_offsets, HcclDataType receive_type);

}  // namespace emulator
