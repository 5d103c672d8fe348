#include "hccl/transport.h"

#include <time.h>
#include <unistd.h>

#include <cstdlib>

namespace emulator {

void Patience::wait(const std::function<std::string()>& missing) {
  looks_++;
  if (process_is_ending()) throw Refusal(ACL_ERROR_RT_WAIT_TIMEOUT, what_ + ": the process is ending");
  double waited = std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  if (waited > settings().timeout)
    throw Refusal(ACL_ERROR_RT_WAIT_TIMEOUT, what_ + ": waited " + std::to_string(static_cast<int>(waited)) + " s for " + missing() +
                                                 " (--timeout); did every rank make the same calls?");
  long nanoseconds = looks_ < 200 ? 0 : looks_ < 2000 ? 20000 : 500000;  // a neighbour on the same core must come to its turn
  timespec pause{0, nanoseconds};
  nanosleep(&pause, nullptr);
}

void Transport::move(std::vector<Message>& messages, const std::string& what) {
  Patience patience(what);
  size_t open = messages.size();
  while (open) {
    bool moved = false;
    std::vector<bool> busy(2 * size);  // a later message of the same direction and peer must wait for the earlier one
    for (Message& m : messages) {
      if (m.finished || busy[2 * m.peer + m.sends]) continue;
      while (!m.finished && advance(m, what)) moved = true;
      if (m.finished)
        open--;
      else
        busy[2 * m.peer + m.sends] = true;
    }
    if (moved || !open) continue;
    if (patience.time_to_check_peers())
      for (Message& m : messages)
        if (!m.finished) require_alive(m.peer, what);
    patience.wait([&] {
      std::string names;
      for (Message& m : messages)
        if (!m.finished) names += (names.empty() ? "rank " : ", rank ") + std::to_string(m.peer) + (m.sends ? " to receive" : " to send");
      return names;
    });
  }
}

std::string make_root() {
  const char* transport = std::getenv("NPU_EMULATOR_TRANSPORT");
  if (transport && std::string(transport) == "tcp") return make_tcp_root();
  static std::atomic<int> count{0};
  timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  return "shm:/npu_emulator_" + std::to_string(getpid()) + "_" + std::to_string(count++) + "_" + std::to_string(t.tv_nsec);
}

std::unique_ptr<Transport> connect(const std::string& root, uint32_t rank, uint32_t size) {
  if (root.rfind("tcp:", 0) == 0) return connect_tcp(root, rank, size);
  if (root.rfind("shm:", 0) == 0) return connect_shared_memory(root, rank, size);
  throw Refusal(ACL_ERROR_RT_PARAM_INVALID, "the root information was not made by the emulator; all ranks must run in it");
}

}  // namespace emulator
