// Words for the ways a work request can end.
#include "nic/nic.h"

namespace railwire {

const char* to_string(Status status) {
  switch (status) {
    case Status::kOk:
      return "ok";
    case Status::kFlushed:
      return "taken back unfinished";
    case Status::kRemoteAccess:
      return "refused by the peer (wrong key or out of range)";
    case Status::kUnreachable:
      return "the connection is gone";
    case Status::kLocal:
      return "wrong local key or length";
    case Status::kOther:
      return "failed";
  }
  return "unknown status";
}

}  // namespace railwire
