// The fake's endpoints, queues and memory, and how it delivers.
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "fake_efa/fake_efa.h"

namespace fake_efa {
namespace {

constexpr int kEfa = -(0xefa << 16);
constexpr int kRnrRetries = 2000;  // rounds in which the receiver had no receive posted
// fi_endpoint.h and fi_ext.h of 2.5
enum Option {
  kCudaApiPermitted = 10,
  kSharedMemoryPermitted = 11,
  kMaxMessage = 12,
  kMaxRma = 14,
  kEmulatedWrite = kEfa + 2,
  kUnsolicitedWriteRecv = kEfa + 8,
};

template <class T, class Fid>
T* object(Fid* fid) {
  return reinterpret_cast<T*>(fid);
}

int no_bind(fid*, fid*, uint64_t) { return 0; }

bool emulates(const Endpoint& endpoint) { return !rules().rdma_write && !endpoint.direct; }

const Memory* find(uint64_t key, uint64_t at, uint64_t length, uint64_t access) {
  const auto found = world().keys.find(key);
  if (found == world().keys.end()) return nullptr;
  const Memory& memory = *found->second;
  const bool inside =
      at >= memory.base && at - memory.base <= memory.length && length <= memory.length - (at - memory.base);
  return inside && (memory.access & access) ? &memory : nullptr;
}

// ---- endpoints ---------------------------------------------------------------------------------------------------

int close_endpoint(fid* fid) {
  auto* endpoint = object<Endpoint>(fid);
  std::lock_guard lock(world().mutex);
  world().forget(endpoint);
  delete endpoint;
  return 0;
}

int bind_endpoint(fid* fid, ::fid* other, uint64_t) {
  auto* endpoint = object<Endpoint>(fid);
  if (other->fclass == FI_CLASS_CQ) endpoint->queue = object<Queue>(other);
  if (other->fclass == FI_CLASS_AV) endpoint->vector = object<Vector>(other);
  return 0;
}

int control_endpoint(fid* fid, int command, void*) {
  auto* endpoint = object<Endpoint>(fid);
  if (command != FI_ENABLE || !endpoint->queue || !endpoint->vector) return -FI_EINVAL;
  std::lock_guard lock(world().mutex);
  endpoint->enabled = true;
  world().endpoints[endpoint->name] = endpoint;
  return 0;
}

int get_name(fid* fid, void* to, size_t* length) {
  const bool fits = *length >= kNameBytes;
  std::memcpy(to, object<Endpoint>(fid)->name.data(), std::min(*length, kNameBytes));
  *length = kNameBytes;
  return fits ? 0 : -FI_ETOOSMALL;
}

int get_option(fid* fid, int level, int option, void* value, size_t* length) {
  auto* endpoint = object<Endpoint>(fid);
  if (level != FI_OPT_ENDPOINT) return -FI_ENOPROTOOPT;
  if (option == kMaxMessage || option == kMaxRma) {
    if (*length < sizeof(size_t)) return -FI_ETOOSMALL;
    const size_t most = !endpoint->direct ? SIZE_MAX : option == kMaxMessage ? rules().message : size_t{1} << 30;
    std::memcpy(value, &most, sizeof most);
    *length = sizeof most;
    return 0;
  }
  if (option == kEmulatedWrite) {
    if (*length < sizeof(bool)) return -FI_ETOOSMALL;
    *static_cast<bool*>(value) = emulates(*endpoint);
    *length = sizeof(bool);
    return 0;
  }
  return -FI_ENOPROTOOPT;
}

int set_option(fid* fid, int level, int option, const void* value, size_t length) {
  auto* endpoint = object<Endpoint>(fid);
  if (level != FI_OPT_ENDPOINT) return -FI_ENOPROTOOPT;
  const bool on = *static_cast<const bool*>(value);
  switch (option) {
    case kCudaApiPermitted:  // "efa" without it needs the device to reach GPU memory
      return !endpoint->direct && !on && rules().hmem && !rules().p2p ? -FI_EOPNOTSUPP : 0;
    case kSharedMemoryPermitted:
      return 0;
    case kUnsolicitedWriteRecv:
      if (!since(2, 5)) return -FI_ENOPROTOOPT;
      if (length != sizeof(bool)) return -FI_EINVAL;
      if (endpoint->direct && !on && !(endpoint->mode & FI_RX_CQ_DATA)) return -FI_EOPNOTSUPP;
      if (!on) endpoint->unsolicited = false;
      return 0;
    default:
      return -FI_ENOPROTOOPT;
  }
}

// ---- posting -----------------------------------------------------------------------------------------------------

ssize_t post(Endpoint* endpoint, Operation operation, fi_addr_t to, void* desc) {
  std::lock_guard lock(world().mutex);
  if (!endpoint->enabled || to >= endpoint->vector->names.size() || endpoint->vector->names[to].empty()) {
    return -FI_EINVAL;
  }
  // One send queue, whoever the work is for; a place is free again when its completion has been read.
  if (endpoint->outstanding >= endpoint->tx) return -FI_EAGAIN;
  if (endpoint->direct) {
    if (!desc) {
      // 2.0 and 2.1 look into the descriptor, 2.2 to 2.4 refuse, 2.5 needs none for length 0.
      if (!since(2, 2)) std::abort();
      if (!since(2, 5) || operation.length > 0 || operation.kind == Operation::kSend) return -FI_EINVAL;
    }
    if (operation.kind == Operation::kSend && operation.length > rules().message) return -FI_EMSGSIZE;
  }
  if (desc) {
    const auto* memory = static_cast<const Memory*>(desc);
    const auto at = reinterpret_cast<uint64_t>(operation.local);
    if (at < memory->base || at - memory->base + operation.length > memory->length) return -FI_EINVAL;
  }
  operation.from = endpoint;
  operation.to = endpoint->vector->names[to];
  ++endpoint->outstanding;
  world().flying.push_back(operation);
  return 0;
}

ssize_t send(fid_ep* ep, const void* buffer, size_t length, void* desc, fi_addr_t to, void* context) {
  return post(object<Endpoint>(ep),
              {.kind = Operation::kSend,
               .from = nullptr,
               .to = {},
               .context = context,
               .local = const_cast<void*>(buffer),
               .length = length,
               .remote = 0,
               .key = 0,
               .immediate = false,
               .data = 0},
              to, desc);
}

ssize_t rma(fid_ep* ep, Operation::Kind kind, const void* buffer, size_t length, void* desc, fi_addr_t to,
            uint64_t address, uint64_t key, bool immediate, uint64_t data, void* context) {
  return post(object<Endpoint>(ep),
              {.kind = kind,
               .from = nullptr,
               .to = {},
               .context = context,
               .local = const_cast<void*>(buffer),
               .length = length,
               .remote = address,
               .key = key,
               .immediate = immediate,
               .data = data},
              to, desc);
}

ssize_t write(fid_ep* ep, const void* buffer, size_t length, void* desc, fi_addr_t to, uint64_t address, uint64_t key,
              void* context) {
  return rma(ep, Operation::kWrite, buffer, length, desc, to, address, key, false, 0, context);
}
ssize_t write_data(fid_ep* ep, const void* buffer, size_t length, void* desc, uint64_t data, fi_addr_t to,
                   uint64_t address, uint64_t key, void* context) {
  return rma(ep, Operation::kWrite, buffer, length, desc, to, address, key, true, data, context);
}
ssize_t write_message(fid_ep* ep, const fi_msg_rma* message, uint64_t flags) {
  return rma(ep, Operation::kWrite, message->msg_iov->iov_base, message->msg_iov->iov_len, message->desc[0],
             message->addr, message->rma_iov->addr, message->rma_iov->key, (flags & FI_REMOTE_CQ_DATA) != 0,
             message->data, message->context);
}
ssize_t read(fid_ep* ep, void* buffer, size_t length, void* desc, fi_addr_t to, uint64_t address, uint64_t key,
             void* context) {
  return rma(ep, Operation::kRead, buffer, length, desc, to, address, key, false, 0, context);
}

ssize_t receive(fid_ep* ep, void* buffer, size_t length, void* desc, fi_addr_t, void* context) {
  auto* endpoint = object<Endpoint>(ep);
  std::lock_guard lock(world().mutex);
  if (endpoint->receives.size() >= endpoint->rx) return -FI_EAGAIN;
  if (endpoint->direct && !desc) return -FI_EINVAL;
  endpoint->receives.push_back({buffer, length, context});
  return 0;
}

// ---- queues ------------------------------------------------------------------------------------------------------

int close_queue(fid* fid) {
  auto* queue = object<Queue>(fid);
  if (queue->event >= 0) ::close(queue->event);
  delete queue;
  return 0;
}

int control_queue(fid* fid, int command, void* out) {
  auto* queue = object<Queue>(fid);
  if (command != FI_GETWAIT || queue->event < 0) return -FI_ENODATA;
  *static_cast<int*>(out) = queue->event;
  return 0;
}

ssize_t read_queue(fid_cq* cq, void* buffer, size_t count) {
  auto* queue = object<Queue>(cq);
  std::lock_guard lock(world().mutex);
  world().progress(queue);
  if (queue->overrun && !rules().silent) return -FI_EOVERRUN;  // fi_cq(3): for good
  if (!queue->errors.empty()) return -FI_EAVAIL;
  if (queue->entries.empty()) return -FI_EAGAIN;
  auto* out = static_cast<fi_cq_data_entry*>(buffer);
  size_t n = 0;
  for (; n < count && !queue->entries.empty(); ++n) {
    out[n] = queue->entries.front();
    queue->entries.pop_front();
  }
  return static_cast<ssize_t>(n);
}

ssize_t read_error(fid_cq* cq, fi_cq_err_entry* out, uint64_t) {
  auto* queue = object<Queue>(cq);
  std::lock_guard lock(world().mutex);
  if (queue->errors.empty()) return -FI_EAGAIN;
  *out = queue->errors.front();
  queue->errors.pop_front();
  return 1;
}

// ---- address vectors and memory ----------------------------------------------------------------------------------

int close_vector(fid* fid) {
  delete object<Vector>(fid);
  return 0;
}

int insert(fid_av* av, const void* address, size_t count, fi_addr_t* out, uint64_t, void*) {
  auto* vector = object<Vector>(av);
  std::lock_guard lock(world().mutex);
  if (count != 1) return -FI_EINVAL;
  vector->names.emplace_back(static_cast<const char*>(address), kNameBytes);
  *out = vector->names.size() - 1;
  return 1;
}

int remove(fid_av* av, fi_addr_t* addresses, size_t count, uint64_t) {
  auto* vector = object<Vector>(av);
  std::lock_guard lock(world().mutex);
  for (size_t i = 0; i < count; ++i) vector->names.at(addresses[i]).clear();
  return 0;
}

int close_memory(fid* fid) {
  auto* memory = object<Memory>(fid);
  std::lock_guard lock(world().mutex);
  world().keys.erase(memory->fid.key);
  delete memory;
  return 0;
}

}  // namespace

// A completion needs a place in the queue, also those that peers bring about.
bool Queue::room() {
  if (entries.size() + errors.size() >= size) overrun = true;
  return !overrun || (rules().silent && entries.size() + errors.size() < size);
}

void Queue::wake() {
  const uint64_t one = 1;
  if (event >= 0 && ::write(event, &one, sizeof one) < 0) std::abort();
}

void Queue::push(const fi_cq_data_entry& entry) {
  if (room()) entries.push_back(entry);
  wake();
}

void Queue::fail(void* context, uint64_t flags, int error) {
  fi_cq_err_entry entry{};
  entry.op_context = context;
  entry.flags = flags;
  entry.err = error;
  if (room()) errors.push_back(entry);
  wake();
}

void World::forget(Endpoint* endpoint) {
  endpoints.erase(endpoint->name);
  std::erase_if(flying, [&](const Operation& operation) { return operation.from == endpoint; });
}

// As far as it goes now: a device does it whoever polls; software only when its own process does.
void World::progress(const Queue* polled) {
  std::shuffle(flying.begin(), flying.end(), random);
  const size_t most = std::min<size_t>(flying.size(), 64 + random() % 64);
  for (size_t i = 0, tried = 0; i < flying.size() && tried < most; ++tried) {
    if (deliver(flying[i], polled)) {
      flying[i] = flying.back();
      flying.pop_back();
    } else {
      ++i;
    }
  }
}

// False: not yet.
bool World::deliver(Operation& op, const Queue* polled) {
  const uint64_t flags = op.kind == Operation::kSend    ? FI_MSG | FI_SEND
                         : op.kind == Operation::kWrite ? FI_RMA | FI_WRITE
                                                        : FI_RMA | FI_READ;
  const auto end = [&](int error) {
    --op.from->outstanding;
    if (error) {
      op.from->queue->fail(op.context, flags, error);
    } else {
      op.from->queue->push({.op_context = op.context, .flags = flags, .len = op.length, .buf = nullptr, .data = 0});
    }
    return true;
  };
  const auto found = endpoints.find(op.to);
  const bool emulated = op.kind != Operation::kSend && emulates(*op.from);
  if (found == endpoints.end()) {
    return emulated ? false : end(FI_EHOSTUNREACH);  // what software waits for, nobody ends
  }
  Endpoint& target = *found->second;
  if (target.silent) return false;
  if (emulated && (target.stopped || target.queue != polled)) return false;
  if (op.kind != Operation::kRead && (op.kind == Operation::kSend || (op.immediate && !target.unsolicited))) {
    if (target.receives.empty()) return ++op.refused > kRnrRetries ? end(FI_ENORX) : false;
  }
  if (op.kind == Operation::kSend) {
    const Posted receive = target.receives.front();
    target.receives.pop_front();
    if (op.length > receive.length) {
      target.queue->fail(receive.context, FI_MSG | FI_RECV, FI_ETRUNC);
      return end(FI_EMSGSIZE);
    }
    std::memcpy(receive.buffer, op.local, op.length);
    target.queue->push(
        {.op_context = receive.context, .flags = FI_MSG | FI_RECV, .len = op.length, .buf = nullptr, .data = 0});
    return end(0);
  }
  const Memory* memory =
      find(op.key, op.remote, op.length, op.kind == Operation::kRead ? FI_REMOTE_READ : FI_REMOTE_WRITE);
  if (!memory) return end(FI_EREMOTEIO);
  auto* remote = reinterpret_cast<void*>(op.remote);
  if (op.length > 0 && op.kind == Operation::kRead) std::memcpy(op.local, remote, op.length);
  if (op.length > 0 && op.kind == Operation::kWrite) std::memcpy(remote, op.local, op.length);
  if (op.immediate) {
    void* context = nullptr;
    if (!target.unsolicited) {
      context = target.receives.front().context;
      target.receives.pop_front();
    }
    target.queue->push({.op_context = context,
                        .flags = FI_RMA | FI_REMOTE_WRITE | FI_REMOTE_CQ_DATA,
                        .len = op.length,
                        .buf = nullptr,
                        .data = op.data});
  }
  return end(0);
}

int open_endpoint(fid_domain* fid, fi_info* info, fid_ep** out, void*) {
  static fi_ops ops{
      .size = sizeof(fi_ops), .close = close_endpoint, .bind = bind_endpoint, .control = control_endpoint};
  static fi_ops_ep ep_ops{.size = sizeof(fi_ops_ep), .getopt = get_option, .setopt = set_option};
  static fi_ops_cm cm_ops{.size = sizeof(fi_ops_cm), .getname = get_name};
  static fi_ops_msg msg_ops{.size = sizeof(fi_ops_msg), .recv = receive, .send = send};
  static fi_ops_rma rma_ops{
      .size = sizeof(fi_ops_rma), .read = read, .write = write, .writemsg = write_message, .writedata = write_data};
  const auto* domain = object<Domain>(fid);
  auto* endpoint = new Endpoint;
  endpoint->fid.fid = {.fclass = FI_CLASS_EP, .context = nullptr, .ops = &ops};
  endpoint->fid.ops = &ep_ops;
  endpoint->fid.cm = &cm_ops;
  endpoint->fid.msg = &msg_ops;
  endpoint->fid.rma = &rma_ops;
  endpoint->direct = domain->direct;
  endpoint->mode = info->mode;
  endpoint->tx = info->tx_attr->size;
  endpoint->rx = info->rx_attr->size;
  // Since 2.4: FI_RX_CQ_DATA in the mode switches unsolicited receives off, whatever the option says.
  endpoint->unsolicited = rules().unsolicited && !(info->mode & FI_RX_CQ_DATA);
  std::lock_guard lock(world().mutex);
  endpoint->name.assign(kNameBytes, '\0');
  const uint64_t number = world().numbers++;
  std::memcpy(endpoint->name.data() + 16, &number, sizeof number);
  *out = &endpoint->fid;
  return 0;
}

int open_queue(fid_domain* fid, fi_cq_attr* attr, fid_cq** out, void*) {
  static fi_ops ops{.size = sizeof(fi_ops), .close = close_queue, .bind = no_bind, .control = control_queue};
  static fi_ops_cq cq_ops{.size = sizeof(fi_ops_cq), .read = read_queue, .readerr = read_error};
  const auto* domain = object<Domain>(fid);
  if (attr->size > rules().cq) return -FI_EINVAL;
  if (attr->format != FI_CQ_FORMAT_DATA) return -FI_ENOSYS;
  // efa-direct has wait objects since 2.3; efa since 2.5, and only without a shm domain of its own.
  const bool waits = domain->direct ? since(2, 3) : since(2, 5) && !domain->own_shm;
  if (attr->wait_obj != FI_WAIT_NONE && !waits) return -FI_ENOSYS;
  auto* queue = new Queue;
  queue->fid.fid = {.fclass = FI_CLASS_CQ, .context = nullptr, .ops = &ops};
  queue->fid.ops = &cq_ops;
  queue->size = attr->size ? attr->size : 8192;
  if (attr->wait_obj == FI_WAIT_FD) queue->event = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  *out = &queue->fid;
  return 0;
}

int trywait(fid_fabric*, fid** fids, int) {
  auto* queue = object<Queue>(fids[0]);
  std::lock_guard lock(world().mutex);
  uint64_t count = 0;
  if (queue->event >= 0 && ::read(queue->event, &count, sizeof count) < 0) count = 0;
  world().progress(queue);
  const bool busy = !queue->entries.empty() || !queue->errors.empty() || queue->overrun || !world().flying.empty();
  return busy ? -FI_EAGAIN : 0;
}

int open_vector(fid_domain*, fi_av_attr*, fid_av** out, void*) {
  static fi_ops ops{.size = sizeof(fi_ops), .close = close_vector, .bind = no_bind};
  static fi_ops_av av_ops{.size = sizeof(fi_ops_av), .insert = insert, .remove = remove};
  auto* vector = new Vector;
  vector->fid.fid = {.fclass = FI_CLASS_AV, .context = nullptr, .ops = &ops};
  vector->fid.ops = &av_ops;
  *out = &vector->fid;
  return 0;
}

int register_memory(fid*, const fi_mr_attr* attr, uint64_t flags, fid_mr** out) {
  static fi_ops ops{.size = sizeof(fi_ops), .close = close_memory, .bind = no_bind};
  struct Range {
    int fd;
    uint64_t offset;
    size_t length;
    char* base;
  };
  const bool device = attr->iface != FI_HMEM_SYSTEM;
  if (device && (!rules().hmem || !rules().p2p)) return -FI_EOPNOTSUPP;
  auto memory = std::make_unique<Memory>();
  if (flags & (1ULL << 40)) {  // FI_MR_DMABUF
    if (!rules().dmabuf) return -FI_EOPNOTSUPP;
    const auto* range = reinterpret_cast<const Range*>(attr->mr_iov);
    memory->base = reinterpret_cast<uint64_t>(range->base + range->offset);
    memory->length = range->length;
  } else {
    memory->base = reinterpret_cast<uint64_t>(attr->mr_iov->iov_base);
    memory->length = attr->mr_iov->iov_len;
  }
  memory->access = attr->access;
  memory->device = device;
  memory->fid.fid = {.fclass = FI_CLASS_MR, .context = nullptr, .ops = &ops};
  memory->fid.mem_desc = memory.get();
  std::lock_guard lock(world().mutex);
  memory->fid.key = world().numbers++;
  world().keys[memory->fid.key] = memory.get();
  *out = &memory.release()->fid;
  return 0;
}

}  // namespace fake_efa
