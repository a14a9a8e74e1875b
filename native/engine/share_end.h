// How a lane's share on one link ends: what has been proven of it, and what still must be. A function of facts and
// nothing else, so that every combination of them can be walked (native/tests/share_end_test.cpp).
#pragma once

namespace railwire {

struct ShareFacts {
  // of the lane and its share
  bool read = false;
  bool stopping = false;     // the lane has failed, or was cancelled
  bool last_proves = false;  // the last WR was a flush, and all have ended well
  bool taken_back = false;   // a WR came back because the link was closed or broke
  // of the NIC (nic.h)
  bool completion_proves_landing = true;
  bool closing_quiets = true;
  // of the link and its peer
  bool up = true;
  bool ever_up = true;
  bool remote_closed = false;  // the peer has confirmed that its half of this link is closed
  bool confirmed = false;      // or that all of its halves are
  bool process_dead = false;
  bool peer_ended = false;  // nothing more is heard of it, but perhaps that
};

enum class ShareEnd {
  kProven,   // nothing of it is under way, and nobody is at its memory
  kFlush,    // a flush on the link will prove it
  kConfirm,  // the peer's word, or the end of its process, will
};

// Nothing of the peer's can reach us, nor anything of ours the peer.
inline bool gone_for_good(const ShareFacts& f) {
  return f.remote_closed || !f.ever_up || f.confirmed || f.process_dead;
}

// Nobody reads our sources or fills our read targets for the link's WRs. For a link that is down.
inline bool quiet(const ShareFacts& f) { return f.closing_quiets || gone_for_good(f); }

// A completion that says only that the bytes were handed over says nothing once the link is gone: the lane has failed.
inline bool lost_its_proof(const ShareFacts& f) {
  return !f.up && !f.read && !f.stopping && !f.last_proves && !f.completion_proves_landing;
}

inline ShareEnd end_of_share(const ShareFacts& f) {
  if (f.up) {
    const bool proven = f.read || f.completion_proves_landing || (f.last_proves && !f.stopping);
    return proven ? ShareEnd::kProven : ShareEnd::kFlush;
  }
  if (f.taken_back && !quiet(f)) return ShareEnd::kConfirm;  // also where it went over another link since
  const bool failed = f.stopping || lost_its_proof(f);
  if (f.read || !failed || gone_for_good(f) || f.peer_ended) return ShareEnd::kProven;
  return ShareEnd::kConfirm;
}

// It ends without a word of the peer's: what was on its way may land.
inline bool may_still_land(const ShareFacts& f) {
  return !f.up && !f.read && f.peer_ended && (f.stopping || lost_its_proof(f)) && !gone_for_good(f);
}

}  // namespace railwire
