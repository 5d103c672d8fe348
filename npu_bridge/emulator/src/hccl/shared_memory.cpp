// Ranks of one machine: a block of POSIX shared memory a communicator. It holds a slot for each rank (what it offers to all) and a
// mailbox for each ordered pair (one piece at a time).
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "hccl/transport.h"

namespace emulator {

namespace {

constexpr uint64_t kSlot = 1 << 20, kMail = 1 << 18;
constexpr size_t kName = 192;

struct RankState {
  alignas(64) std::atomic<uint64_t> arrived;  // steps that this rank has reached; all wait for the slowest
  std::atomic<int> pid;
  char what[kName];  // the call this rank is in
  uint64_t bytes;
};
struct Mailbox {
  alignas(64) std::atomic<uint64_t> produced, consumed;
  uint64_t message_bytes, piece_bytes;
  char data[kMail];
};

class SharedMemory : public Transport {
 public:
  SharedMemory(const std::string& root, uint32_t rank, uint32_t size) : Transport(rank, size) {
    std::string name = root.substr(4);
    length_ = size * sizeof(RankState) + size * kSlot + static_cast<uint64_t>(size) * size * sizeof(Mailbox) + 4096;
    int file = shm_open(name.c_str(), O_CREAT | O_RDWR, 0600);
    if (file < 0 || ftruncate(file, static_cast<off_t>(length_)))
      throw Refusal(ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "no shared memory of " + std::to_string(length_) + " bytes (" + std::strerror(errno) + "); /dev/shm may be full");
    base_ = static_cast<char*>(mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0));
    close(file);
    if (base_ == MAP_FAILED) throw Refusal(ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "shared memory could not be mapped");
    state(rank).pid = getpid();
    struct Unlink {  // the name is not needed once all have come, and must not outlive a failure
      const std::string& name;
      bool mine;
      ~Unlink() {
        if (mine) shm_unlink(name.c_str());
      }
    } unlink{name, rank == 0};
    meet("making a communicator of " + std::to_string(size) + " ranks", 0);
  }
  ~SharedMemory() override { munmap(base_, length_); }

  void share(const char* mine, uint64_t bytes, const std::string& what,
             const std::function<void(uint32_t, uint64_t, const char*, uint64_t)>& see) override {
    for (uint64_t offset = 0; offset == 0 || offset < bytes; offset += kSlot) {
      uint64_t piece = std::min(kSlot, bytes - offset);
      if (piece) std::memcpy(slot(rank), mine + offset, piece);
      meet(what, bytes);
      for (uint32_t q = 0; q < size; q++) {
        if (std::strncmp(state(q).what, state(rank).what, kName) || state(q).bytes != bytes)
          throw Refusal(ACL_ERROR_RT_PARAM_INVALID, "ranks make different calls: rank " + std::to_string(rank) + " " + what + " of " + std::to_string(bytes) +
                                                        " bytes, rank " + std::to_string(q) + " " + state(q).what + " of " + std::to_string(state(q).bytes));
        if (piece) see(q, offset, slot(q), piece);
      }
      meet(what, bytes);  // no rank overwrites its slot before all have read it
    }
  }

 protected:
  bool advance(Message& m, const std::string& what) override {
    Mailbox& box = m.sends ? mailbox(rank, m.peer) : mailbox(m.peer, rank);
    bool full = box.produced.load(std::memory_order_acquire) != box.consumed.load(std::memory_order_acquire);
    if (m.sends == full) return false;
    if (m.sends) {
      box.message_bytes = m.bytes;
      box.piece_bytes = std::min(kMail, m.bytes - m.done);
      std::memcpy(box.data, m.data + m.done, box.piece_bytes);
      m.done += box.piece_bytes;
      box.produced.fetch_add(1, std::memory_order_release);
    } else {
      if (box.message_bytes != m.bytes)
        throw Refusal(ACL_ERROR_RT_PARAM_INVALID, what + ": rank " + std::to_string(m.peer) + " sends " + std::to_string(box.message_bytes) + " bytes, rank " +
                                                      std::to_string(rank) + " expects " + std::to_string(m.bytes));
      std::memcpy(m.data + m.done, box.data, box.piece_bytes);
      m.done += box.piece_bytes;
      box.consumed.fetch_add(1, std::memory_order_release);
    }
    m.finished = m.done == m.bytes;
    return true;
  }

  void require_alive(uint32_t peer, const std::string& what) override {
    int pid = state(peer).pid;
    if (pid && kill(pid, 0) && errno == ESRCH)
      throw Refusal(ACL_ERROR_RT_SUSPECT_REMOTE_ERROR, what + ": rank " + std::to_string(peer) + " (process " + std::to_string(pid) + ") has ended");
  }

 private:
  void meet(const std::string& what, uint64_t bytes) {
    RankState& mine = state(rank);
    std::strncpy(mine.what, what.c_str(), kName - 1);
    mine.bytes = bytes;
    uint64_t step = mine.arrived.fetch_add(1, std::memory_order_acq_rel) + 1;
    Patience patience(what);
    for (uint32_t q = 0; q < size; q++)
      while (state(q).arrived.load(std::memory_order_acquire) < step) {
        if (patience.time_to_check_peers()) require_alive(q, what);
        patience.wait([&] {
          std::string names;
          for (uint32_t p = 0; p < size; p++)
            if (state(p).arrived.load() < step) names += (names.empty() ? "rank " : ", rank ") + std::to_string(p);
          return names;
        });
      }
  }

  RankState& state(uint32_t q) { return reinterpret_cast<RankState*>(base_)[q]; }
  char* slot(uint32_t q) { return base_ + size * sizeof(RankState) + q * kSlot; }
  Mailbox& mailbox(uint32_t from, uint32_t to) {
    char* first = base_ + size * sizeof(RankState) + size * kSlot;
    return reinterpret_cast<Mailbox*>(first)[from * size + to];
  }

  char* base_;
  uint64_t length_;
};

}  // namespace

std::unique_ptr<Transport> connect_shared_memory(const std::string& root, uint32_t rank, uint32_t size) {
  return std::make_unique<SharedMemory>(root, rank, size);
}

}  // namespace emulator
