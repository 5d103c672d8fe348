// The collectives. Each is a task on its stream that waits for the other ranks; the calling thread never does.
#include <algorithm>
#include <cstring>
#include <tuple>

#include "hccl/communicator.h"
#include "hccl/reduction.h"

namespace emulator {

// ---- the exchanges ---------------------------------------------------------------------------------------------------------------------

static std::string title(const char* name, HcclDataType type) { return std::string(name) + " " + name_of(type); }
static std::string title(const char* name, HcclDataType type, HcclReduceOp op) { return title(name, type) + " " + name_of(op); }

// Elements [first, last) of the reduction of `count` elements go to `receive`, which may be null.
static void reduce(Communicator& c, const std::string& what, const void* send, void* receive, uint64_t count, uint64_t first, uint64_t last, HcclDataType type,
                   HcclReduceOp op) {
  Reduction reduction(type, op, first, last, receive);
  c.transport->share(static_cast<const char*>(send), count * size_of(type), what,
                     [&](uint32_t q, uint64_t offset, const char* piece, uint64_t n) { reduction.see(q, c.size(), offset, piece, n); });
}

void all_reduce(Communicator& c, const void* send, void* receive, uint64_t count, HcclDataType type, HcclReduceOp op) {
  reduce(c, title("all_reduce", type, op), send, receive, count, 0, count, type, op);
}
void reduce_scatter(Communicator& c, const void* send, void* receive, uint64_t receive_count, HcclDataType type, HcclReduceOp op) {
  uint64_t first = receive_count * c.rank();
  // The input may hold the output: it is gathered beside and moved at the end.
  std::vector<char> result(receive_count * size_of(type));
  reduce(c, title("reduce_scatter", type, op), send, result.data(), receive_count * c.size(), first, first + receive_count, type, op);
  std::memcpy(receive, result.data(), result.size());
}
void all_gather(Communicator& c, const void* send, void* receive, uint64_t send_count, HcclDataType type) {
  uint64_t bytes = send_count * size_of(type);
  std::vector<char> mine(static_cast<const char*>(send), static_cast<const char*>(send) + bytes);  // it may lie inside the output
  c.transport->share(mine.data(), bytes, title("all_gather", type), [&](uint32_t q, uint64_t offset, const char* piece, uint64_t n) {
    std::memcpy(static_cast<char*>(receive) + q * bytes + offset, piece, n);
  });
}
static void broadcast(Communicator& c, void* data, uint64_t bytes, uint32_t root, const std::string& what) {
  if (root >= c.size()) throw Refusal(ACL_ERROR_RT_PARAM_INVALID, what + " from rank " + std::to_string(root) + " of " + std::to_string(c.size()));
  std::vector<Message> messages;
  for (uint32_t q = 0; q < c.size(); q++)
    if (c.rank() == root && q != root)
      messages.push_back({true, q, static_cast<char*>(data), bytes});
    else if (c.rank() != root && q == root)
      messages.push_back({false, root, static_cast<char*>(data), bytes});
  c.transport->move(messages, what);
}
void all_to_all(Communicator& c, const void* send, const std::vector<uint64_t>& send_counts, const std::vector<uint64_t>& send_offsets, HcclDataType send_type,
                void* receive, const std::vector<uint64_t>& receive_counts, const std::vector<uint64_t>& receive_offsets, HcclDataType receive_type) {
  uint64_t out = size_of(send_type), in = size_of(receive_type);
  std::vector<Message> messages;
  for (uint32_t q = 0; q < c.size(); q++) {
    char* from = static_cast<char*>(const_cast<void*>(send)) + send_offsets[q] * out;
    char* to = static_cast<char*>(receive) + receive_offsets[q] * in;
    if (q == c.rank()) {
      if (send_counts[q] * out != receive_counts[q] * in) throw Refusal(ACL_ERROR_RT_PARAM_INVALID, "all_to_all: a rank keeps another number of elements than it sends to itself");
      std::memmove(to, from, send_counts[q] * out);
      continue;
    }
    // Empty messages go as well: a peer that thinks otherwise is found.
    messages.push_back({true, q, from, send_counts[q] * out});
    messages.push_back({false, q, to, receive_counts[q] * in});
  }
  c.transport->move(messages, title("all_to_all", send_type));
}

// ---- calls -----------------------------------------------------------------------------------------------------------------------------

template <class Exchange>
static HcclResult start(Counter& counter, HcclComm handle, aclrtStream stream, uint64_t bytes, std::vector<const void*> addresses, Exchange exchange) {
  int code = guarded(counter.name.c_str(), [&] {
    if (!handle) throw Refusal(ACL_ERROR_RT_PARAM_INVALID, "null communicator");
    auto& c = *static_cast<Communicator*>(handle);
    uint64_t number = ++c.calls;
    counter.add_bytes(bytes);
    stream_of(stream).submit({&counter,
                              [&c, &counter, exchange, number] {
                                if (!settings().execute) return;
                                try {
                                  exchange(c);
                                } catch (const Refusal& refusal) {
                                  c.failed = true;
                                  std::string message = counter.name + " number " + std::to_string(number) + " on communicator " + c.name + ", rank " +
                                                        std::to_string(c.rank()) + " of " + std::to_string(c.size()) + ": " + refusal.what();
                                  if (!process_is_ending()) std::fprintf(stderr, "npu emulator: %s\n", message.c_str());
                                  set_recent_error(message);
                                  throw Refusal(refusal.code, message);
                                }
                              },
                              true, addresses});
  });
  return code ? HCCL_E_INTERNAL : HCCL_SUCCESS;
}

static std::vector<uint64_t> numbers(const void* values, uint32_t count) {
  auto* v = static_cast<const uint64_t*>(values);
  return {v, v + count};
}
static uint32_t size_of_communicator(HcclComm handle) { return handle ? static_cast<Communicator*>(handle)->size() : 0; }

#define COLLECTIVE(NAME) static Counter NAME##_counter(Kind::collective, #NAME)
COLLECTIVE(HcclAllReduce);
COLLECTIVE(HcclReduce);
COLLECTIVE(HcclReduceScatter);
COLLECTIVE(HcclReduceScatterV);
COLLECTIVE(HcclBroadcast);
COLLECTIVE(HcclAllGather);
COLLECTIVE(HcclAllGatherV);
COLLECTIVE(HcclScatter);
COLLECTIVE(HcclAlltoAll);
COLLECTIVE(HcclAlltoAllV);
COLLECTIVE(HcclAlltoAllVC);
COLLECTIVE(HcclSend);
COLLECTIVE(HcclRecv);
COLLECTIVE(HcclBatchSendRecv);
COLLECTIVE(HcclBarrier);

}  // namespace emulator

using namespace emulator;

EMULATED HcclResult HcclAllReduce(void* send, void* receive, uint64_t count, HcclDataType type, HcclReduceOp op, HcclComm comm, aclrtStream stream) {
  return start(HcclAllReduce_counter, comm, stream, count * size_of(type), {send, receive}, [=](Communicator& c) { all_reduce(c, send, receive, count, type, op); });
}
EMULATED HcclResult HcclReduce(void* send, void* receive, uint64_t count, HcclDataType type, HcclReduceOp op, uint32_t root, HcclComm comm, aclrtStream stream) {
  return start(HcclReduce_counter, comm, stream, count * size_of(type), {send}, [=](Communicator& c) {
    reduce(c, title("reduce", type, op), send, c.rank() == root ? receive : nullptr, count, 0, count, type, op);
  });
}
EMULATED HcclResult HcclReduceScatter(void* send, void* receive, uint64_t count, HcclDataType type, HcclReduceOp op, HcclComm comm, aclrtStream stream) {
  return start(HcclReduceScatter_counter, comm, stream, count * size_of(type), {send, receive},
               [=](Communicator& c) { reduce_scatter(c, send, receive, count, type, op); });
}
EMULATED HcclResult HcclReduceScatterV(void* send, const void* counts, const void* offsets, void* receive, uint64_t count, HcclDataType type, HcclReduceOp op,
                                       HcclComm comm, aclrtStream stream) {
  uint32_t n = size_of_communicator(comm);
  auto k = numbers(counts, n), o = numbers(offsets, n);
  return start(HcclReduceScatterV_counter, comm, stream, count * size_of(type), {send, receive}, [=](Communicator& c) {
    uint64_t whole = 0;
    for (uint32_t q = 0; q < n; q++) whole = std::max(whole, o[q] + k[q]);
    std::vector<char> result(count * size_of(type));
    reduce(c, title("reduce_scatter_v", type, op), send, result.data(), whole, o[c.rank()], o[c.rank()] + count, type, op);
    std::memcpy(receive, result.data(), result.size());
  });
}
EMULATED HcclResult HcclBroadcast(void* data, uint64_t count, HcclDataType type, uint32_t root, HcclComm comm, aclrtStream stream) {
  return start(HcclBroadcast_counter, comm, stream, count * size_of(type), {data},
               [=](Communicator& c) { broadcast(c, data, count * size_of(type), root, title("broadcast", type)); });
}
EMULATED HcclResult HcclAllGather(void* send, void* receive, uint64_t count, HcclDataType type, HcclComm comm, aclrtStream stream) {
  return start(HcclAllGather_counter, comm, stream, count * size_of(type), {send, receive}, [=](Communicator& c) { all_gather(c, send, receive, count, type); });
}
EMULATED HcclResult HcclAllGatherV(void* send, uint64_t count, void* receive, const void* counts, const void* offsets, HcclDataType type, HcclComm comm,
                                   aclrtStream stream) {
  uint32_t n = size_of_communicator(comm);
  auto k = numbers(counts, n), o = numbers(offsets, n);
  return start(HcclAllGatherV_counter, comm, stream, count * size_of(type), {send, receive}, [=](Communicator& c) {
    std::vector<char> mine(static_cast<char*>(send), static_cast<char*>(send) + count * size_of(type));
    std::vector<uint64_t> sent(n, count), zero(n, 0);
    all_to_all(c, mine.data(), sent, zero, type, receive, k, o, type);
  });
}
EMULATED HcclResult HcclScatter(void* send, void* receive, uint64_t count, HcclDataType type, uint32_t root, HcclComm comm, aclrtStream stream) {
  return start(HcclScatter_counter, comm, stream, count * size_of(type), {receive}, [=](Communicator& c) {
    uint64_t bytes = count * size_of(type);
    std::vector<Message> messages;
    if (c.rank() == root) {
      for (uint32_t q = 0; q < c.size(); q++)
        if (q != root) messages.push_back({true, q, static_cast<char*>(send) + q * bytes, bytes});
      std::memmove(receive, static_cast<char*>(send) + root * bytes, bytes);
    } else {
      messages.push_back({false, root, static_cast<char*>(receive), bytes});
    }
    c.transport->move(messages, title("scatter", type));
  });
}
EMULATED HcclResult HcclAlltoAllV(const void* send, const void* send_counts, const void* send_offsets, HcclDataType send_type, const void* receive,
                                  const void* receive_counts, const void* receive_offsets, HcclDataType receive_type, HcclComm comm, aclrtStream stream) {
  uint32_t n = size_of_communicator(comm);
  auto sk = numbers(send_counts, n), so = numbers(send_offsets, n), rk = numbers(receive_counts, n), ro = numbers(receive_offsets, n);
  uint64_t bytes = 0;
  for (uint64_t k : sk) bytes += k * size_of(send_type);
  return start(HcclAlltoAllV_counter, comm, stream, bytes, {send, receive},
               [=](Communicator& c) { all_to_all(c, send, sk, so, send_type, const_cast<void*>(receive), rk, ro, receive_type); });
}
EMULATED HcclResult HcclAlltoAll(const void* send, uint64_t count, HcclDataType send_type, const void* receive, uint64_t receive_count, HcclDataType receive_type,
                                 HcclComm comm, aclrtStream stream) {
  uint32_t n = size_of_communicator(comm);
  std::vector<uint64_t> sk(n, count), rk(n, receive_count), so(n), ro(n);
  for (uint32_t q = 0; q < n; q++) so[q] = q * count, ro[q] = q * receive_count;
  return start(HcclAlltoAll_counter, comm, stream, n * count * size_of(send_type), {send, receive},
               [=](Communicator& c) { all_to_all(c, send, sk, so, send_type, const_cast<void*>(receive), rk, ro, receive_type); });
}
// The whole matrix of counts, row by row of the sender; messages lie one after another.
EMULATED HcclResult HcclAlltoAllVC(const void* send, const void* matrix, HcclDataType send_type, const void* receive, HcclDataType receive_type, HcclComm comm,
                                   aclrtStream stream) {
  uint32_t n = size_of_communicator(comm);
  auto all = numbers(matrix, n * n);
  return start(HcclAlltoAllVC_counter, comm, stream, 0, {send, receive}, [=](Communicator& c) {
    std::vector<uint64_t> sk(n), rk(n), so(n), ro(n);
    for (uint32_t q = 0; q < n; q++) sk[q] = all[c.rank() * n + q], rk[q] = all[q * n + c.rank()];
    for (uint32_t q = 1; q < n; q++) so[q] = so[q - 1] + sk[q - 1], ro[q] = ro[q - 1] + rk[q - 1];
    all_to_all(c, send, sk, so, send_type, const_cast<void*>(receive), rk, ro, receive_type);
  });
}

// ---- point to point --------------------------------------------------------------------------------------------------------------------

static HcclResult point_to_point(Counter& counter, std::vector<HcclSendRecvItem> items, HcclComm comm, aclrtStream stream) {
  uint64_t bytes = 0;
  std::vector<const void*> addresses;
  for (auto& item : items) bytes += item.sendRecvType == HCCL_SEND ? item.count * size_of(item.dataType) : 0, addresses.push_back(item.buf);
  return start(counter, comm, stream, bytes, addresses, [=](Communicator& c) {
    std::vector<Message> messages;
    for (auto& item : items) {
      if (item.remoteRank >= c.size() || item.remoteRank == c.rank()) throw Refusal(ACL_ERROR_RT_PARAM_INVALID, "peer " + std::to_string(item.remoteRank));
      messages.push_back({item.sendRecvType == HCCL_SEND, item.remoteRank, static_cast<char*>(item.buf), item.count * size_of(item.dataType)});
    }
    c.transport->move(messages, "point to point");
  });
}
// Between HcclGroupStart and HcclGroupEnd messages are collected and then move together, in whatever order makes progress.
struct Group {
  int depth = 0;
  std::vector<std::tuple<HcclComm, aclrtStream, std::vector<HcclSendRecvItem>>> batches;
};
static thread_local Group group;

static HcclResult now_or_with_the_group(Counter& counter, HcclSendRecvItem item, HcclComm comm, aclrtStream stream) {
  if (group.depth == 0) return point_to_point(counter, {item}, comm, stream);
  for (auto& [c, s, items] : group.batches)
    if (c == comm && s == stream) {
      items.push_back(item);
      return HCCL_SUCCESS;
    }
  group.batches.push_back({comm, stream, {item}});
  return HCCL_SUCCESS;
}
EMULATED HcclResult HcclGroupStart() {
  group.depth++;
  return HCCL_SUCCESS;
}
EMULATED HcclResult HcclGroupEnd() {
  if (group.depth == 0 || --group.depth > 0) return HCCL_SUCCESS;
  auto batches = std::move(group.batches);
  group.batches.clear();
  for (auto& [comm, stream, items] : batches)
    if (HcclResult failed = point_to_point(HcclBatchSendRecv_counter, items, comm, stream)) return failed;
  return HCCL_SUCCESS;
}

EMULATED HcclResult HcclSend(void* data, uint64_t count, HcclDataType type, uint32_t to, HcclComm comm, aclrtStream stream) {
  return now_or_with_the_group(HcclSend_counter, {HCCL_SEND, data, count, type, to}, comm, stream);
}
EMULATED HcclResult HcclRecv(void* data, uint64_t count, HcclDataType type, uint32_t from, HcclComm comm, aclrtStream stream) {
  return now_or_with_the_group(HcclRecv_counter, {HCCL_RECV, data, count, type, from}, comm, stream);
}
EMULATED HcclResult HcclBatchSendRecv(HcclSendRecvItem* items, uint32_t count, HcclComm comm, aclrtStream stream) {
  return point_to_point(HcclBatchSendRecv_counter, {items, items + count}, comm, stream);
}
EMULATED HcclResult HcclBarrier(HcclComm comm, aclrtStream stream) {
  return start(HcclBarrier_counter, comm, stream, 0, {}, [](Communicator& c) { c.transport->share(nullptr, 0, "barrier", [](uint32_t, uint64_t, const char*, uint64_t) {}); });
}
