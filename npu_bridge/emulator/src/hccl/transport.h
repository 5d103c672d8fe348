// How the ranks of one communicator reach each other. Two ways: shared memory of one machine, and TCP.
#pragma once

#include <memory>

#include "runtime/runtime.h"

namespace emulator {

// One message to or from a peer. Both sides know its size; a difference is an error, not a truncation.
struct Message {
  bool sends;
  uint32_t peer;
  char* data;
  uint64_t bytes;
  uint64_t done = 0;
  bool finished = false;
};

class Transport {
 public:
  Transport(uint32_t rank, uint32_t size) : rank(rank), size(size) {}
  virtual ~Transport() = default;

  // Moves all messages, in any interleaving that makes progress; those between one pair keep their order. `what` names the call in
  // errors. Throws Refusal when a peer is gone, sends another size, or does not answer within the time-out.
  void move(std::vector<Message>& messages, const std::string& what);

  // Everyone offers `bytes` bytes (the same number everywhere); see(q, offset, piece, n) gets every rank's bytes, piece by piece, and
  // for one offset in the order of the ranks. Also checks that all ranks mean the same call.
  virtual void share(const char* mine, uint64_t bytes, const std::string& what,
                     const std::function<void(uint32_t, uint64_t, const char*, uint64_t)>& see) = 0;

  const uint32_t rank, size;

 protected:
  // One step of one message; returns whether anything moved.
  virtual bool advance(Message& message, const std::string& what) = 0;
  // Throws when a peer that is waited for has ended.
  virtual void require_alive(uint32_t peer, const std::string& what) = 0;
};

// Waits in growing steps and throws after the time-out of the settings, naming what is waited for.
class Patience {
 public:
  explicit Patience(std::string what) : what_(std::move(what)), start_(std::chrono::steady_clock::now()) {}
  // Call once a fruitless look. `missing` tells what is missing, for the message.
  void wait(const std::function<std::string()>& missing);
  bool time_to_check_peers() const { return looks_ % 256 == 255; }

 private:
  std::string what_;
  std::chrono::steady_clock::time_point start_;
  uint64_t looks_ = 0;
};

// Description of a communicator's first rank that the others need: goes through HcclRootInfo.
std::string make_root();
std::unique_ptr<Transport> connect(const std::string& root, uint32_t rank, uint32_t size);

std::string make_tcp_root();
std::unique_ptr<Transport> connect_tcp(const std::string& root, uint32_t rank, uint32_t size);
std::unique_ptr<Transport> connect_shared_memory(const std::string& root, uint32_t rank, uint32_t size);

}  // namespace emulator
