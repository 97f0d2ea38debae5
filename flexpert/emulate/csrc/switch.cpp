// A switch in user space: one TAP device per node, links of a given rate and delay between them.
//
//   switch FD RATE DELAY  [FD RATE DELAY ...]     one port each: an open TAP, bits per second (0: no limit), ns
//
// A frame waits in the FIFO of its sender's uplink, is sent there at the port's rate, travels for the sum of both
// ports' delays, waits in the FIFO of the receiver's downlink and is sent there at that port's rate. It takes its
// place in the downlink when it arrives there: one reserved when it is read would let a frame of a slow sender,
// still far away, block those that arrive before it.
//
// Each line on standard input is a command, answered by one line: cut P, heal P, rate P BITS, delay P NS, stats P.
// The end of standard input ends the switch, so that it never outlives who started it.

#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <queue>
#include <string>
#include <vector>

namespace {

constexpr size_t kFrameBytes = 9216;     // the longest frame: an MTU of 9000 and its header
constexpr size_t kQueueFrames = 16384;   // of an uplink or downlink; more are dropped, as by a real switch
constexpr int kBatch = 64;               // frames read from one port before the others have their turn

using Time = int64_t;  // ns of the monotonic clock

struct Frame {
  int from, to;
  size_t size;
  unsigned char data[kFrameBytes];
};
using FramePtr = std::unique_ptr<Frame>;

using Line = std::deque<FramePtr>;  // one direction of a port: what waits, its first frame being sent

struct Port {
  int fd;
  int64_t rate;
  Time delay;
  bool cut = false;
  Line up, down;
  uint64_t up_bytes = 0, down_bytes = 0, dropped = 0;
};

enum class Stage { kSent, kArrived, kReceived };

struct Event {
  Time time;
  uint64_t order;  // of events at one time: as they were made
  Stage stage;
  int port;
  Frame* frame;  // of kArrived, owned by the event
  bool operator<(const Event& other) const {
    return time != other.time ? time > other.time : order > other.order;
  }
};

Time now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

class Switch {
 public:
  explicit Switch(std::deque<Port> ports) : ports_(std::move(ports)) {}

  // Handles what is due; the time of the next event, or -1.
  Time advance() {
    while (!events_.empty() && events_.top().time <= now()) {
      Event event = events_.top();
      events_.pop();
      if (event.stage == Stage::kSent) sent(event);
      else if (event.stage == Stage::kArrived) arrived(event);
      else received(event);
    }
    return events_.empty() ? -1 : events_.top().time;
  }

  void read_frames(int port) {
    for (int i = 0; i < kBatch; ++i) {
      FramePtr frame = take();
      ssize_t size = read(ports_[port].fd, frame->data, kFrameBytes);
      if (size < 14) {
        give(std::move(frame));
        return;
      }
      // Nodes have the addresses 02:00:00:00:hi:lo; there is no ARP, and nothing else is for a node.
      const unsigned char* to = frame->data;
      int target = to[4] << 8 | to[5];
      bool known = to[0] == 2 && !to[1] && !to[2] && !to[3] && target < int(ports_.size());
      Port& sender = ports_[port];
      if (!known || sender.cut || sender.up.size() >= kQueueFrames) {
        sender.dropped += known;
        give(std::move(frame));
        continue;
      }
      frame->from = port;
      frame->to = target;
      frame->size = size;
      sender.up.push_back(std::move(frame));
      if (sender.up.size() == 1) send(sender.up, port, Stage::kSent, now());
    }
  }

  std::string command(const std::string& line) {
    char word[16] = "";
    int port = -1;
    long long value = 0;
    int read = sscanf(line.c_str(), "%15s %d %lld", word, &port, &value);
    std::string name = word;
    if (read < 2 || port < 0 || port >= int(ports_.size())) return "error: no such command or port: " + line;
    Port& p = ports_[port];
    if (name == "cut") p.cut = true;
    else if (name == "heal") p.cut = false;
    else if (name == "rate" && read == 3 && value >= 0) p.rate = value;
    else if (name == "delay" && read == 3 && value >= 0) p.delay = value;
    else if (name == "stats") {
      return "ok " + std::to_string(p.up_bytes) + " " + std::to_string(p.down_bytes) + " " +
             std::to_string(p.dropped);
    } else return "error: no such command: " + line;
    return "ok";
  }

  const std::deque<Port>& ports() const { return ports_; }

 private:
  // The first frame of the line goes out from `start` on.
  void send(const Line& line, int port, Stage stage, Time start) {
    int64_t rate = ports_[port].rate;
    Time duration = rate ? Time(__int128(line.front()->size) * 8 * 1000000000LL / rate) : 0;
    events_.push({start + duration, order_++, stage, port, nullptr});
  }

  void sent(const Event& event) {
    Port& port = ports_[event.port];
    FramePtr frame = std::move(port.up.front());
    port.up.pop_front();
    if (!port.up.empty()) send(port.up, event.port, Stage::kSent, event.time);
    port.up_bytes += frame->size;
    Time arrival = event.time + port.delay + ports_[frame->to].delay;
    events_.push({arrival, order_++, Stage::kArrived, frame->to, frame.release()});
  }

  void arrived(const Event& event) {
    FramePtr frame(event.frame);
    Port& port = ports_[event.port];
    if (port.down.size() >= kQueueFrames) {
      ++port.dropped;
      give(std::move(frame));
      return;
    }
    port.down.push_back(std::move(frame));
    if (port.down.size() == 1) send(port.down, event.port, Stage::kReceived, event.time);
  }

  void received(const Event& event) {
    Port& port = ports_[event.port];
    FramePtr frame = std::move(port.down.front());
    port.down.pop_front();
    if (!port.down.empty()) send(port.down, event.port, Stage::kReceived, event.time);
    // A cut also takes what is under way.
    bool lost = port.cut || ports_[frame->from].cut ||
                write(port.fd, frame->data, frame->size) != ssize_t(frame->size);
    if (lost) ++port.dropped;
    else port.down_bytes += frame->size;
    give(std::move(frame));
  }

  FramePtr take() {
    if (spare_.empty()) return FramePtr(new Frame);
    FramePtr frame = std::move(spare_.back());
    spare_.pop_back();
    return frame;
  }

  void give(FramePtr frame) {
    if (spare_.size() < kQueueFrames) spare_.push_back(std::move(frame));
  }

  std::deque<Port> ports_;
  std::priority_queue<Event> events_;
  std::vector<FramePtr> spare_;
  uint64_t order_ = 0;
};

// Answers the whole lines of what is there; false at the end of the input.
bool obey(Switch& fabric, std::string& pending) {
  char buffer[4096];
  ssize_t size = read(STDIN_FILENO, buffer, sizeof buffer);
  if (size == 0 || (size < 0 && errno != EAGAIN && errno != EINTR)) return false;
  if (size > 0) pending.append(buffer, size);
  for (size_t end; (end = pending.find('\n')) != std::string::npos; pending.erase(0, end + 1)) {
    std::string answer = fabric.command(pending.substr(0, end)) + "\n";
    if (write(STDOUT_FILENO, answer.data(), answer.size()) < 0) return false;
  }
  return true;
}

}  // namespace

int main(int count, char** words) {
  if (count < 4 || count % 3 != 1) {
    fputs("usage: switch FD RATE DELAY [FD RATE DELAY ...]\n", stderr);
    return 2;
  }
  std::deque<Port> ports;
  for (int i = 1; i < count; i += 3) {
    Port port;
    port.fd = atoi(words[i]);
    port.rate = atoll(words[i + 1]);
    port.delay = atoll(words[i + 2]);
    if (fcntl(port.fd, F_SETFL, O_NONBLOCK) != 0) {
      fprintf(stderr, "switch: port %d: %s\n", i / 3, strerror(errno));
      return 1;
    }
    ports.push_back(std::move(port));
  }
  prctl(PR_SET_TIMERSLACK, 1UL);
  sched_param priority{};
  priority.sched_priority = 10;
  bool realtime = sched_setscheduler(0, SCHED_FIFO, &priority) == 0;  // without it: late under load, no worse
  signal(SIGPIPE, SIG_IGN);
  Switch fabric(std::move(ports));
  std::vector<pollfd> polled;
  for (const Port& port : fabric.ports()) polled.push_back({port.fd, POLLIN, 0});
  polled.push_back({STDIN_FILENO, POLLIN, 0});
  const char* ready = realtime ? "ready realtime\n" : "ready\n";
  if (write(STDOUT_FILENO, ready, strlen(ready)) < 0) return 1;
  std::string pending;
  while (true) {
    Time next = fabric.advance();
    Time wait = next < 0 ? 0 : std::max<Time>(0, next - now());
    timespec timeout{time_t(wait / 1000000000LL), long(wait % 1000000000LL)};
    if (ppoll(polled.data(), polled.size(), next < 0 ? nullptr : &timeout, nullptr) <= 0) continue;
    for (size_t i = 0; i + 1 < polled.size(); ++i)
      if (polled[i].revents) fabric.read_frames(int(i));
    if (polled.back().revents && !obey(fabric, pending)) return 0;
  }
}
