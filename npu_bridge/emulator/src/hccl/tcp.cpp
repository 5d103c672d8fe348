// Ranks that may be on several machines: one connection a pair. Addresses are distributed by the first rank, which listens from the
// moment its root information is made.
#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>

#include "hccl/transport.h"

namespace emulator {

namespace {

[[noreturn]] void fail(const std::string& what) { throw Refusal(ACL_ERROR_RT_SOCKET_CLOSE, what + ": " + std::strerror(errno)); }

struct Address {
  char host[64];
  uint16_t port;
};

// The address others reach this machine by: HCCL_IF_IP as for the real library, else the one that leads to MASTER_ADDR.
std::string own_host() {
  if (const char* given = std::getenv("HCCL_IF_IP")) return given;
  const char* master = std::getenv("MASTER_ADDR");
  addrinfo hints{}, *found = nullptr;
  hints.ai_family = AF_INET;
  hints.ai_socktype = SOCK_DGRAM;
  if (!master || getaddrinfo(master, "9", &hints, &found) || !found) return "127.0.0.1";
  int probe = socket(AF_INET, SOCK_DGRAM, 0);
  sockaddr_in local{};
  socklen_t length = sizeof local;
  bool known = !::connect(probe, found->ai_addr, found->ai_addrlen) && !getsockname(probe, reinterpret_cast<sockaddr*>(&local), &length);
  close(probe);
  freeaddrinfo(found);
  char text[64] = "127.0.0.1";
  if (known) inet_ntop(AF_INET, &local.sin_addr, text, sizeof text);
  return text;
}

int listen_anywhere(uint16_t& port) {
  int s = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = INADDR_ANY;
  socklen_t length = sizeof address;
  if (s < 0 || bind(s, reinterpret_cast<sockaddr*>(&address), sizeof address) || listen(s, 1024) || getsockname(s, reinterpret_cast<sockaddr*>(&address), &length))
    fail("listening for ranks");
  port = ntohs(address.sin_port);
  return s;
}

int reach(const Address& where, const std::string& what) {
  Patience patience(what);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(where.port);
  inet_pton(AF_INET, where.host, &address.sin_addr);
  for (;;) {
    int s = socket(AF_INET, SOCK_STREAM, 0);
    if (!::connect(s, reinterpret_cast<sockaddr*>(&address), sizeof address)) return s;
    close(s);
    patience.wait([&] { return std::string(where.host) + ":" + std::to_string(where.port) + " to answer"; });
  }
}

int accept_one(int listener, const std::string& what) {
  fcntl(listener, F_SETFL, O_NONBLOCK);
  Patience patience(what);
  for (;;) {
    int s = accept(listener, nullptr, nullptr);
    if (s >= 0) {
      fcntl(s, F_SETFL, 0);
      return s;
    }
    if (errno != EAGAIN && errno != EWOULDBLOCK) fail(what);
    patience.wait([] { return "the other ranks to connect"; });
  }
}

void write_all(int s, const void* data, size_t bytes) {
  for (auto* p = static_cast<const char*>(data); bytes;) {
    ssize_t n = ::send(s, p, bytes, MSG_NOSIGNAL);
    if (n <= 0) fail("introducing ranks to each other");
    p += n, bytes -= static_cast<size_t>(n);
  }
}
void read_all(int s, void* data, size_t bytes) {
  for (auto* p = static_cast<char*>(data); bytes;) {
    ssize_t n = recv(s, p, bytes, 0);
    if (n <= 0) fail("introducing ranks to each other");
    p += n, bytes -= static_cast<size_t>(n);
  }
}

std::map<uint16_t, int>& root_listeners() {
  static auto* all = new std::map<uint16_t, int>;
  return *all;
}

struct Introduction {
  uint32_t rank;
  Address address;
};

// What precedes every message on a connection.
struct Head {
  uint64_t bytes;
  uint64_t call;  // hash of the call's name: both sides must mean the same
};

class Tcp : public Transport {
 public:
  Tcp(const std::string& root, uint32_t rank, uint32_t size) : Transport(rank, size), sockets_(size, -1), out_(size), in_(size) {
    std::string what = "making a communicator of " + std::to_string(size) + " ranks over TCP";
    size_t colon = root.rfind(':');
    Address first{};
    std::strncpy(first.host, root.substr(4, colon - 4).c_str(), sizeof first.host - 1);
    first.port = static_cast<uint16_t>(std::stoi(root.substr(colon + 1)));
    Address mine{};
    std::strncpy(mine.host, own_host().c_str(), sizeof mine.host - 1);
    int listener = listen_anywhere(mine.port);
    std::vector<Address> all(size);
    if (rank == 0) {
      auto known = root_listeners().find(first.port);
      if (known == root_listeners().end()) throw Refusal(ACL_ERROR_RT_PARAM_INVALID, "rank 0 must be the process that made the root information");
      all[0] = mine;
      std::vector<int> others;
      for (uint32_t i = 1; i < size; i++) {
        others.push_back(accept_one(known->second, what));
        Introduction who;
        read_all(others.back(), &who, sizeof who);
        if (who.rank == 0 || who.rank >= size) throw Refusal(ACL_ERROR_RT_PARAM_INVALID, what + ": rank " + std::to_string(who.rank) + " came");
        all[who.rank] = who.address;
      }
      for (int s : others) {
        write_all(s, all.data(), size * sizeof(Address));
        close(s);
      }
      close(known->second);
      root_listeners().erase(known);
    } else {
      int s = reach(first, what);
      Introduction me{rank, mine};
      write_all(s, &me, sizeof me);
      read_all(s, all.data(), size * sizeof(Address));
      close(s);
    }
    // Each pair once: the higher rank calls the lower.
    for (uint32_t q = 0; q < rank; q++) {
      sockets_[q] = reach(all[q], what);
      write_all(sockets_[q], &rank, sizeof rank);
    }
    for (uint32_t i = rank + 1; i < size; i++) {
      int s = accept_one(listener, what);
      uint32_t who;
      read_all(s, &who, sizeof who);
      sockets_[who] = s;
    }
    close(listener);
    int one = 1;
    for (int s : sockets_)
      if (s >= 0) setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one), fcntl(s, F_SETFL, O_NONBLOCK);
  }
  ~Tcp() override {
    for (int s : sockets_)
      if (s >= 0) close(s);
  }

  void share(const char* mine, uint64_t bytes, const std::string& what,
             const std::function<void(uint32_t, uint64_t, const char*, uint64_t)>& see) override {
    constexpr uint64_t kPiece = 1 << 20;
    std::vector<char> theirs(std::min(kPiece, std::max<uint64_t>(bytes, 1)) * size);
    char token = 0;  // a barrier also when there are no bytes
    for (uint64_t offset = 0; offset == 0 || offset < bytes; offset += kPiece) {
      uint64_t piece = std::min(kPiece, bytes - offset);
      uint64_t moved = std::max<uint64_t>(piece, 1);
      std::vector<Message> messages;
      for (uint32_t q = 0; q < size; q++) {
        if (q == rank) continue;
        messages.push_back({true, q, piece ? const_cast<char*>(mine) + offset : &token, moved});
        messages.push_back({false, q, theirs.data() + q * moved, moved});
      }
      move(messages, what);
      for (uint32_t q = 0; q < size && piece; q++) see(q, offset, q == rank ? mine + offset : theirs.data() + q * moved, piece);
    }
  }

 protected:
  bool advance(Message& m, const std::string& what) override {
    if (m.peer == rank) throw Refusal(ACL_ERROR_RT_PARAM_INVALID, what + ": a rank sends to itself");
    Side& side = (m.sends ? out_ : in_)[m.peer];
    if (side.head_done < sizeof(Head)) {
      if (m.sends && side.head_done == 0) side.head = {m.bytes, std::hash<std::string>()(what)};
      ssize_t n = step(m.sends, sockets_[m.peer], reinterpret_cast<char*>(&side.head) + side.head_done, sizeof(Head) - side.head_done, m.peer, what);
      side.head_done += static_cast<size_t>(n);
      if (side.head_done == sizeof(Head) && !m.sends) check(side.head, m, what);
      if (side.head_done < sizeof(Head)) return n > 0;
    }
    ssize_t n = m.bytes == m.done ? 0 : step(m.sends, sockets_[m.peer], m.data + m.done, m.bytes - m.done, m.peer, what);
    m.done += static_cast<uint64_t>(n);
    if (m.done == m.bytes) {
      m.finished = true;
      side = {};
      return true;
    }
    return n > 0;
  }

  void require_alive(uint32_t, const std::string&) override {}  // a closed connection is the signal

 private:
  struct Side {
    Head head{};
    size_t head_done = 0;
  };

  void check(const Head& head, const Message& m, const std::string& what) {
    if (head.bytes != m.bytes)
      throw Refusal(ACL_ERROR_RT_PARAM_INVALID, what + ": rank " + std::to_string(m.peer) + " sends " + std::to_string(head.bytes) + " bytes, rank " +
                                                    std::to_string(rank) + " expects " + std::to_string(m.bytes));
    if (head.call != std::hash<std::string>()(what))
      throw Refusal(ACL_ERROR_RT_PARAM_INVALID, "ranks make different calls: rank " + std::to_string(rank) + " " + what + ", rank " + std::to_string(m.peer) + " another");
  }

  ssize_t step(bool sends, int s, char* data, size_t bytes, uint32_t peer, const std::string& what) {
    ssize_t n = sends ? ::send(s, data, bytes, MSG_NOSIGNAL) : recv(s, data, bytes, 0);
    if (n > 0) return n;
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) return 0;
    throw Refusal(ACL_ERROR_RT_SUSPECT_REMOTE_ERROR, what + ": rank " + std::to_string(peer) + " closed the connection (it has ended, or failed)");
  }

  std::vector<int> sockets_;
  std::vector<Side> out_, in_;
};

}  // namespace

std::string make_tcp_root() {
  uint16_t port = 0;
  int listener = listen_anywhere(port);
  root_listeners()[port] = listener;
  return "tcp:" + own_host() + ":" + std::to_string(port);
}

std::unique_ptr<Transport> connect_tcp(const std::string& root, uint32_t rank, uint32_t size) { return std::make_unique<Tcp>(root, rank, size); }

}  // namespace emulator
