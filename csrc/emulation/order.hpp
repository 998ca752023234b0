// The order in which blocks, and the ready threads of a block, take their turns. A result that
// depends on it means a missing barrier. MSF_EMULATION_ORDER chooses, read at each launch:
// "fifo" (the default), "lifo", or "random" with a seed: "random:7".
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <stdexcept>
#include <string>
#include <utility>

namespace msf::emulation {

struct Order {
  enum Kind { fifo, lifo, random } kind = fifo;
  uint64_t seed = 0;

  static Order from_environment() {
    const char* value = std::getenv("MSF_EMULATION_ORDER");
    const std::string text = value ? value : "fifo";
    if (text == "fifo") return {fifo, 0};
    if (text == "lifo") return {lifo, 0};
    const std::string digits = text.rfind("random:", 0) == 0 ? text.substr(7) : "";
    if (digits.empty() || digits.size() > 9 ||
        digits.find_first_not_of("0123456789") != std::string::npos) {
      throw std::runtime_error("MSF_EMULATION_ORDER: must be fifo, lifo or random:SEED, got '" +
                               text + "'");
    }
    return {random, std::stoull(digits)};
  }
};

// The blocks or threads that wait for their turn.
template <class T>
class Queue {
 public:
  Queue(Order order, uint64_t stream) : kind_(order.kind), state_(order.seed + (stream << 32)) {}

  bool empty() const { return items_.empty(); }
  void push(T item) { items_.push_back(item); }

  T pop() {
    if (kind_ == Order::random) std::swap(items_[draw() % items_.size()], items_.back());
    T item = kind_ == Order::fifo ? items_.front() : items_.back();
    kind_ == Order::fifo ? items_.pop_front() : items_.pop_back();
    return item;
  }

 private:
  // Knuth's linear congruential generator (MMIX); the high bits are the random ones.
  uint64_t draw() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return state_ >> 33;
  }

  Order::Kind kind_;
  uint64_t state_;
  std::deque<T> items_;
};

}  // namespace msf::emulation
