#include "cuda/stream_words.h"

#include <map>
#include <utility>

namespace railwire::cuda {
namespace {

std::mutex all_mutex;
std::map<int, std::shared_ptr<StreamWords>>& all_words() {
  static auto* all = new std::map<int, std::shared_ptr<StreamWords>>;  // never destroyed: streams may outlive statics
  return *all;
}

}  // namespace

StreamWord::~StreamWord() { owner_->give_back(index_, value_); }

std::shared_ptr<StreamWords> StreamWords::of(int ordinal) {
  std::lock_guard lock(all_mutex);
  auto& words = all_words()[ordinal];
  if (!words) words = std::make_shared<StreamWords>(Device::open(ordinal));
  return words;
}

StreamWords::StreamWords(std::shared_ptr<Device> device) : device_(std::move(device)) {}

uint64_t* StreamWords::word(uint32_t index) const {
  return reinterpret_cast<uint64_t*>(pages_[index / kPerPage]->data()) + index % kPerPage;
}

DevicePointer StreamWords::on_device(uint32_t index) const {
  return pages_[index / kPerPage]->on_device(index % kPerPage * sizeof(uint64_t));
}

std::shared_ptr<StreamWord> StreamWords::take() {
  std::erase_if(unreached_, [this](const auto& one) {
    const bool reached = std::atomic_ref<uint64_t>(*word(one.first)).load(std::memory_order_acquire) >= one.second;
    if (reached) free_.push_back(one.first);
    return reached;
  });
  if (free_.empty()) {
    const auto first = static_cast<uint32_t>(pages_.size()) * kPerPage;
    pages_.push_back(std::make_unique<PinnedMemory>(device_, kPerPage * sizeof(uint64_t)));
    values_.resize(first + kPerPage, 0);
    for (uint32_t i = kPerPage; i > 0; --i) free_.push_back(first + i - 1);
  }
  const uint32_t index = free_.back();
  free_.pop_back();
  return std::shared_ptr<StreamWord>(new StreamWord(shared_from_this(), index, ++values_[index], word(index)));
}

void StreamWords::give_back(uint32_t index, uint64_t value) {
  std::lock_guard lock(mutex_);
  const bool reached = std::atomic_ref<uint64_t>(*word(index)).load(std::memory_order_acquire) >= value;
  if (reached) {
    free_.push_back(index);
  } else {
    unreached_.emplace_back(index, value);
  }
}

std::shared_ptr<StreamWord> StreamWords::wait_in(Stream stream) {
  std::shared_ptr<StreamWord> taken;
  DevicePointer at = 0;
  {
    std::lock_guard lock(mutex_);
    taken = take();
    at = on_device(taken->index_);
  }
  const Device::Current current(*device_);
  const Result code = driver().stream_wait_value(stream, at, taken->value_, kWaitGreaterOrEqual);
  if (code != kSuccess) taken->raise();  // nobody waits for it: the word is free
  driver().check(code, "having a stream wait for a word");
  return taken;
}

std::shared_ptr<StreamWord> StreamWords::mark_in(Stream stream) {
  std::shared_ptr<StreamWord> taken;
  DevicePointer at = 0;
  {
    std::lock_guard lock(mutex_);
    taken = take();
    at = on_device(taken->index_);
  }
  const Device::Current current(*device_);
  const Result code = driver().stream_write_value(stream, at, taken->value_, 0);
  if (code != kSuccess) taken->raise();
  driver().check(code, "having a stream write a word");
  return taken;
}

std::shared_ptr<StreamWord> StreamWords::mark_after(Event event) {
  const Driver& cuda = driver();
  Stream idle = nullptr;
  {
    std::lock_guard lock(mutex_);
    const Device::Current current(*device_);
    for (const Stream stream : streams_) {
      if (cuda.stream_query(stream) == kSuccess) idle = stream;
    }
    if (!idle) {
      cuda.check(cuda.stream_create(&idle, kStreamNonBlocking, 0), "creating a stream");
      streams_.push_back(idle);
    }
    cuda.check(cuda.stream_wait_event(idle, event, 0), "waiting for an event");
  }
  return mark_in(idle);
}

size_t StreamWords::in_use() {
  std::lock_guard lock(mutex_);
  return values_.size() - free_.size();
}

}  // namespace railwire::cuda
