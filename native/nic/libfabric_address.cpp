// Names and addresses: what the user calls a NIC, and what endpoints tell each other about themselves.
//
// An endpoint's address travels as: version (1 byte), libfabric's major version (1), the provider's wire protocol (4)
// and address format (4), length and bytes of the name, length and bytes of the wake-up name. All of it comes from the
// network and is checked against what our own endpoints look like.
#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>

#include "nic/libfabric_internal.h"
#include "nic/network.h"

namespace railwire {
namespace {

constexpr uint8_t kAddressVersion = 1;
constexpr size_t kLongestName = 90;  // so that the whole stays under the 128 bytes of a link's address
constexpr std::string_view kShmPrefix = "fi_ns://";

[[noreturn]] void bad_spec(const std::string& spec, const std::string& why) {
  throw NicError("NIC \"" + spec + "\": " + why);
}

void parse_tcp(const std::string& text, LibfabricSpec& spec) {
  const std::string start = "libfabric:tcp://";
  const std::string form = "write " + start + "HOST[:PORT], with an IPv6 address in brackets";
  std::string rest = text.substr(start.size());
  if (rest.starts_with('[')) {
    const size_t end = rest.find(']');
    if (end == std::string::npos) bad_spec(text, form);
    spec.host = rest.substr(1, end - 1);
    rest = rest.substr(end + 1);
  } else {
    const size_t colon = rest.find(':');
    spec.host = rest.substr(0, colon);
    rest = colon == std::string::npos ? "" : rest.substr(colon);
  }
  if (spec.host.empty()) bad_spec(text, "the host is missing; " + form);
  if (rest.empty()) return;
  unsigned port = 0;
  const auto [end, error] = std::from_chars(rest.data() + 1, rest.data() + rest.size(), port);
  if (rest[0] != ':' || error != std::errc() || end != rest.data() + rest.size() || port > 65535) {
    bad_spec(text, "\"" + rest + "\" is not a port (1 to 65535); " + form);
  }
  if (port != 0) spec.port = std::to_string(port);
}

template <class T>
void put(std::vector<std::byte>& out, const T& value) {
  const size_t at = out.size();
  out.resize(at + sizeof value);
  std::memcpy(out.data() + at, &value, sizeof value);
}

void put_text(std::vector<std::byte>& out, const std::string& text) {
  out.push_back(static_cast<std::byte>(text.size()));
  const auto* bytes = reinterpret_cast<const std::byte*>(text.data());
  out.insert(out.end(), bytes, bytes + text.size());
}

template <class T>
bool get(std::span<const std::byte>& in, T& value) {
  if (in.size() < sizeof value) return false;
  std::memcpy(&value, in.data(), sizeof value);
  in = in.subspan(sizeof value);
  return true;
}

bool get_text(std::span<const std::byte>& in, std::string& text) {
  uint8_t length = 0;
  if (!get(in, length) || in.size() < length) return false;
  text.assign(reinterpret_cast<const char*>(in.data()), length);
  in = in.subspan(length);
  return true;
}

// "fi_ns://railwire-<wake-up name>-<number>", with its terminating zero.
bool valid_shm_name(const std::string& name, const std::string& wakeup) {
  const std::string start = std::string(kShmPrefix) + HostWakeup::file_prefix(wakeup) + "-";
  if (!HostWakeup::valid_name(wakeup) || !name.starts_with(start) || name.back() != '\0') return false;
  const std::string number = name.substr(start.size(), name.size() - start.size() - 1);
  return !number.empty() && number.size() <= 20 && number.find_first_not_of("0123456789") == std::string::npos;
}

}  // namespace

LibfabricSpec parse_libfabric_spec(const std::string& text, const std::map<std::string, std::string>& options) {
  LibfabricSpec spec;
  spec.text = text;
  spec.kind = spec.provider = text.substr(0, text.find(':'));
  if (text.starts_with("libfabric:tcp://")) {
    spec.kind = spec.provider = "tcp";
    parse_tcp(text, spec);
  } else if (spec.kind == "efa") {
    spec.domain = text.size() > 4 ? text.substr(4) : "";
  } else if (spec.kind == "libfabric") {
    const std::string rest = text.size() > 10 ? text.substr(10) : "";
    const size_t colon = rest.find(':');
    spec.kind = spec.provider = rest.substr(0, colon);
    if (colon != std::string::npos) spec.domain = rest.substr(colon + 1);
    if (spec.provider.empty())
      bad_spec(text, "write libfabric:PROVIDER[:DOMAIN]; `railwire doctor` lists the providers");
    if (spec.kind == "tcp") spec.host = default_host();
  } else {
    bad_spec(text, "use efa:DOMAIN, libfabric:PROVIDER[:DOMAIN] or libfabric:tcp://HOST[:PORT]");
  }
  if (spec.provider == "efa") spec.fabric = "efa";
  if (spec.provider == "efa-direct") {
    spec.provider = "efa";
    spec.fabric = "efa-direct";
  }
  // "tcp;ofi_rxm" is a tcp; but "verbs;ofi_rxm" speaks a protocol of its own, which the verbs NIC does not.
  spec.kind = spec.kind.starts_with("verbs;") ? "verbs-ofi" : spec.kind.substr(0, spec.kind.find(';'));
  if (const auto depth = options.find("link_depth"); depth != options.end()) {
    const std::string& value = depth->second;
    const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), spec.link_depth);
    if (error != std::errc() || end != value.data() + value.size() || spec.link_depth == 0 || spec.link_depth > 65536) {
      bad_spec(text, "option link_depth is \"" + value + "\"; it must be 1 to 65536");
    }
  }
  if (const auto option = options.find("unsolicited_write_recv"); option != options.end()) {
    if (option->second != "on" && option->second != "off") {
      bad_spec(text, "option unsolicited_write_recv is \"" + option->second + "\"; it must be on or off");
    }
    spec.unsolicited_write_recv = option->second == "on";
  }
  return spec;
}

std::string LibfabricNic::endpoint_name(fid_ep* ep) const {
  char name[256];
  size_t length = sizeof name;
  check(fi_getname(&ep->fid, name, &length), "asking for the endpoint's name");
  if (length > kLongestName) {
    throw NicError(prefix() + "the provider's addresses are " + std::to_string(length) + " bytes long; at most " +
                   std::to_string(kLongestName) + " are supported");
  }
  return {name, length};
}

std::vector<std::byte> LibfabricNic::pack(const std::string& name) const {
  std::vector<std::byte> blob;
  put(blob, kAddressVersion);
  put(blob, static_cast<uint8_t>(FI_MAJOR(libfabric_api().version)));
  put(blob, static_cast<uint32_t>(fi_->ep_attr->protocol));
  put(blob, static_cast<uint32_t>(fi_->addr_format));
  put_text(blob, name);
  put_text(blob, wakeup_ ? wakeup_->name() : "");
  return blob;
}

EndpointAddress LibfabricNic::unpack(std::span<const std::byte> blob) const {
  const std::string malformed = prefix() + "malformed address of a peer: ";
  uint8_t version = 0, major = 0;
  uint32_t protocol = 0, format = 0;
  EndpointAddress address;
  if (!get(blob, version) || version != kAddressVersion) {
    throw NicError(malformed + "version " + std::to_string(version) + ", expected " + std::to_string(kAddressVersion) +
                   "; both sides need the same release of railwire");
  }
  if (!get(blob, major) || !get(blob, protocol) || !get(blob, format) || !get_text(blob, address.name) ||
      !get_text(blob, address.wakeup) || !blob.empty()) {
    throw NicError(malformed + "wrong length");
  }
  const bool shm = spec_.kind == "shm";
  const auto our_major = static_cast<uint8_t>(FI_MAJOR(libfabric_api().version));
  // tcp speaks another protocol in 2.x than in 1.x (where ofi_rxm makes it), and shm lays its memory out differently.
  if (protocol != fi_->ep_attr->protocol || (shm && major != our_major)) {
    throw NicError(prefix() + "the peer's libfabric " + std::to_string(major) + ".x speaks another " + spec_.kind +
                   " protocol than our " + libfabric_api().version_text() +
                   "; use the same libfabric on both sides (RAILWIRE_LIBFABRIC names it)");
  }
  if (format != fi_->addr_format) throw NicError(malformed + "another address format, such as IPv6 for IPv4");
  if (shm) {
    if (!valid_shm_name(address.name, address.wakeup)) throw NicError(malformed + "not a name of shm endpoints");
    return address;
  }
  if (address.name.size() != control_name_.size()) throw NicError(malformed + "wrong length of the endpoint's name");
  if (fi_->addr_format == FI_SOCKADDR_IN || fi_->addr_format == FI_SOCKADDR_IN6) {
    sockaddr_in6 ours{}, theirs{};  // the longer of the two kinds
    std::memcpy(&ours, control_name_.data(), std::min(sizeof ours, control_name_.size()));
    std::memcpy(&theirs, address.name.data(), std::min(sizeof theirs, address.name.size()));
    if (theirs.sin6_family != ours.sin6_family) throw NicError(malformed + "another address family");
    if (theirs.sin6_port == 0) throw NicError(malformed + "port 0");  // the field lies alike in both kinds
  }
  address.wakeup.clear();
  return address;
}

fi_addr_t LibfabricNic::insert(fid_av* av, const EndpointAddress& address) const {
  fi_addr_t handle = FI_ADDR_UNSPEC;
  const int inserted = fi_av_insert(av, address.name.data(), 1, &handle, 0, nullptr);
  if (inserted < 0) libfabric_check(inserted, prefix() + "taking in the address of a peer");
  if (inserted != 1 || handle == FI_ADDR_UNSPEC || handle == FI_ADDR_NOTAVAIL) {
    throw NicError(prefix() + "the provider does not accept the address of a peer; has the peer ended?");
  }
  return handle;
}

std::shared_ptr<HostBell> LibfabricNic::bell_of(const std::string& wakeup) {
  if (wakeup.empty()) return nullptr;
  std::weak_ptr<HostBell>& known = bells_by_name_[wakeup];
  std::shared_ptr<HostBell> bell = known.lock();
  if (!bell) {
    try {
      bell = std::make_shared<HostBell>(wakeup);
    } catch (...) {
      bells_by_name_.erase(wakeup);
      throw;
    }
    known = bell;
    bells_.push_back(bell.get());
  }
  return bell;
}

void LibfabricNic::refresh_bells() {
  bells_.clear();
  std::erase_if(bells_by_name_, [](const auto& entry) { return entry.second.expired(); });
  for (const auto& entry : bells_by_name_) bells_.push_back(entry.second.lock().get());
}

}  // namespace railwire
