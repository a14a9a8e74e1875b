// The life of a link: a function from (state, event) to (state, actions), and nothing else, so that every event can be
// walked in every state (native/tests/link_state_test.cpp). Who executes the actions: engine/links.cpp.
//
//   connecting -> up --broke--> closing --shut--> down --both halves shut, nothing under way--> settled
//                  ^                                                                               |  in turn
//                  |                                                                             making
//                  |          initiator: offered --answer--> joining --joined--> up  <-------------|
//                  |           acceptor: answered --ready--> up              <----------------------
//
//   leaving: our half is closed because the peer closes the connection. ended: the peer has ended. gone: all is freed.
//
// A link has two halves, ours and the peer's. A *half* of ours is one Link of a NIC (nic.h): made, perhaps connected,
// closed, shut, and freed once. A generation is a pair of halves; what one side says of its half names it. Only where
// the NIC is resumable (nic.h) does a link get beyond settled.
//
// Every state that waits for the peer has a deadline (deadline() below); those that wait for a provider or for the
// set-up thread end when its call does. What proves that nobody is at our memory any more is in share_end.h.
#pragma once

#include <cstdint>

namespace railwire {

enum class LinkPhase : uint8_t {
  kConnecting,  // the handshake (Python) ends it: connected, or abandoned
  kUp,          // takes WRs
  kLeaving,     // the peer closes the connection; ends with it
  kClosing,     // our half is closed; the provider has not let go of it
  kDown,        // our half is shut; the peer's word that its half is, and our last WRs, are awaited
  kSettled,     // both are shut, and nothing is under way: it may be made anew
  kMaking,      // the set-up thread makes a new half; the acceptor's also connects it to the one offered
  kOffered,     // initiator: the peer has been given our new half; its own is awaited
  kJoining,     // initiator: the set-up thread connects our half to the peer's
  kAnswered,    // acceptor: the peer has been given our half; that it is connected to it is awaited
  kEnded,       // the peer has ended: freed when no WR is in the provider's hands, and no lane waits for it
  kGone,
};
inline constexpr int kLinkPhases = static_cast<int>(LinkPhase::kGone) + 1;

enum class LinkEvent : uint8_t {
  kConnected,   // the first halves have been joined
  kBroke,       // by what we see: an error, silence, WRs that stand still
  kLeave,       // the peer closes the connection, and nothing of ours is under way to it
  kPeerDown,    // the peer has closed its half of this generation, and asks us to
  kPeerClosed,  // the same, as an answer
  kShut,        // nothing lands through our half any more; its count of what has landed is final
  kDrained,     // all our WRs are back, and nobody waits for anything of this link
  kTurn,        // the time has come to make it anew; the acceptor has an offer
  kMade,        // by the set-up thread ...
  kNotMade,     // ... or why not is known
  kOffer,       // acceptor: another offer has come, newer than what we do or did
  kAnswer,      // initiator: the peer's half
  kRefused,     // initiator: the peer cannot make one now
  kJoined,      // by the set-up thread ...
  kNotJoined,   // ... or why not is known
  kReady,       // acceptor: the initiator's half is connected
  kLate,        // the deadline of the phase has passed
  kPeerEnded,
  kReleased,  // of an ended peer: nothing of the link is in anybody's hands
};
inline constexpr int kLinkEvents = static_cast<int>(LinkEvent::kReleased) + 1;

// What is to be done, in this order.
inline constexpr uint32_t kCloseHalf = 1 << 0;   // Link::close() of ours
inline constexpr uint32_t kTakeBack = 1 << 1;    // it was up: what it carried goes over others, waits, or fails
inline constexpr uint32_t kRetryLater = 1 << 2;  // it may be made anew after a pause, which grows
inline constexpr uint32_t kConfirmed = 1 << 3;   // the peer's word has come: whoever waited for it goes on
inline constexpr uint32_t kSayDown = 1 << 4;    // to the peer, with our count: our half is shut; shut yours, and say so
inline constexpr uint32_t kSayClosed = 1 << 5;  // the same, as an answer
inline constexpr uint32_t kMakeHalf = 1 << 6;   // by the set-up thread
inline constexpr uint32_t kUseHalf =
    1 << 7;  // what it has made takes the place of the one that is shut, which is freed
inline constexpr uint32_t kDropHalf = 1 << 8;  // what it has made is freed
inline constexpr uint32_t kSayOffer = 1 << 9;
inline constexpr uint32_t kSayAnswer = 1 << 10;
inline constexpr uint32_t kSayRefused = 1 << 11;
inline constexpr uint32_t kJoin = 1 << 12;  // by the set-up thread
inline constexpr uint32_t kSayReady = 1 << 13;
inline constexpr uint32_t kServe = 1 << 14;     // takes WRs from now on
inline constexpr uint32_t kLosePeer = 1 << 15;  // it is heard, and does not do its part
inline constexpr uint32_t kFreeHalf = 1 << 16;  // for good

struct LinkState {
  bool resumable = false;
  bool initiator = false;  // of the connection: offers new halves
  LinkPhase phase = LinkPhase::kConnecting;
  bool ever_up = false;        // this generation has been: the peer may have written through it
  bool remote_closed = false;  // the peer has said that its half of this generation is shut
  bool shut = false;           // our half is
  bool in_setup = false;       // the set-up thread is at our half: only its return makes room for others
  enum class Word : uint8_t { kNone, kDown, kClosed } word = Word::kNone;  // to be said when our half is shut

  bool up() const { return phase == LinkPhase::kUp; }
  // Nothing lands through this generation any more, in either direction.
  bool over() const { return remote_closed || !ever_up; }
  bool operator==(const LinkState&) const = default;
};

// In liveness times, after which kLate is due; 0: the phase does not wait for the peer.
inline constexpr int kStallFactor = 4;
inline constexpr int deadline(LinkPhase phase) {
  switch (phase) {
    case LinkPhase::kClosing:  // a provider that does not let go: nothing else would end what waits for this link
    case LinkPhase::kDown:
    case LinkPhase::kAnswered:  // longer than the initiator waits for the answer: it begins again by then
      return kStallFactor;
    case LinkPhase::kOffered:
      return 1;
    case LinkPhase::kConnecting:  // the handshake has its own
    case LinkPhase::kUp:          // work requests that stand still break the link: Engine::tick_peer()
    case LinkPhase::kLeaving:     // the close has its own: Engine::close_step()
    case LinkPhase::kSettled:     // for its turn; a peer without any link for a liveness time is lost
    case LinkPhase::kMaking:      // for the set-up thread
    case LinkPhase::kJoining:
    case LinkPhase::kEnded:  // for a process that may be at our memory (share_end.h)
    case LinkPhase::kGone:
      return 0;
  }
  return 0;
}

struct LinkStep {
  LinkState state;
  uint32_t actions = 0;
};

namespace link_step {

inline uint32_t say(LinkState& s) {
  const auto word = s.word;
  s.word = LinkState::Word::kNone;
  if (word == LinkState::Word::kNone) return 0;
  return word == LinkState::Word::kDown ? kSayDown : kSayClosed;
}

// Our half is closed, or is being.
inline uint32_t close(LinkState& s, uint32_t more = 0) {
  s.phase = LinkPhase::kClosing;
  return kCloseHalf | more;
}

// The peer's word about its half of this generation.
inline uint32_t peer_closed(LinkState& s, LinkEvent event) {
  const uint32_t news = s.remote_closed ? 0 : kConfirmed;
  s.remote_closed = true;
  if (event == LinkEvent::kPeerDown) s.word = LinkState::Word::kClosed;
  return news | (s.shut ? say(s) : 0);
}

// A new half that came to nothing.
inline uint32_t give_up(LinkState& s) { return close(s, kRetryLater); }

inline uint32_t in_phase(LinkState& s, LinkEvent event) {
  using E = LinkEvent;
  using P = LinkPhase;
  const bool peers_word = event == E::kPeerDown || event == E::kPeerClosed;
  switch (s.phase) {
    case P::kConnecting:
      if (event != E::kConnected) return 0;
      s.phase = P::kUp;
      s.ever_up = true;
      return 0;
    case P::kUp: {
      const uint32_t broken = kTakeBack | (s.resumable ? kRetryLater : 0);
      if (event == E::kBroke) {
        s.word = LinkState::Word::kDown;
        return close(s, broken);
      }
      if (peers_word) {
        const uint32_t news = peer_closed(s, event);
        return close(s, broken) | news;
      }
      if (event != E::kLeave) return 0;
      s.phase = P::kLeaving;
      return kCloseHalf;
    }
    case P::kLeaving:
    case P::kClosing:
      if (peers_word) return peer_closed(s, event);
      if (event == E::kShut && !s.shut) {
        s.shut = true;
        if (s.phase == P::kClosing) s.phase = P::kDown;
        return say(s);
      }
      return event == E::kLate && s.phase == P::kClosing ? kLosePeer : 0;
    case P::kDown:
      if (peers_word) return peer_closed(s, event);
      if (event == E::kDrained && s.over()) s.phase = P::kSettled;
      return event == E::kLate ? kLosePeer : 0;
    case P::kSettled:
      if (peers_word) return peer_closed(s, event);
      if (event != E::kTurn || !s.resumable) return 0;
      s.phase = P::kMaking;
      return kMakeHalf;
    case P::kMaking:
      if (event == E::kNotMade) {
        s.phase = P::kSettled;
        return kRetryLater | (s.initiator ? 0 : kSayRefused);
      }
      if (event != E::kMade) return 0;
      s.ever_up = s.remote_closed = s.shut = false;
      s.phase = s.initiator ? P::kOffered : P::kAnswered;
      return kUseHalf | (s.initiator ? kSayOffer : kSayAnswer);
    case P::kOffered:
      if (event == E::kAnswer) {
        s.phase = P::kJoining;
        s.in_setup = true;
        return kJoin;
      }
      if (peers_word) {
        const uint32_t news = peer_closed(s, event);
        return give_up(s) | news;
      }
      return event == E::kRefused || event == E::kLate ? give_up(s) : 0;
    case P::kJoining:
      if (peers_word) return peer_closed(s, event);  // acted upon when the thread is back
      if (event != E::kJoined && event != E::kNotJoined) return 0;
      s.in_setup = false;
      if (event == E::kNotJoined || s.remote_closed) return give_up(s);
      s.phase = P::kUp;
      s.ever_up = true;
      return kSayReady | kServe;
    case P::kAnswered:
      if (event == E::kReady) {
        s.phase = P::kUp;
        s.ever_up = true;
        return kServe;
      }
      if (peers_word) {
        const uint32_t news = peer_closed(s, event);
        return close(s) | news;
      }
      if (event == E::kLate) s.word = LinkState::Word::kDown;  // or the initiator may think that it is up
      return event == E::kOffer || event == E::kLate ? close(s) : 0;
    case P::kEnded:
      switch (event) {
        case E::kShut:
          s.shut = true;
          return 0;
        case E::kMade:
          return kDropHalf;
        case E::kJoined:
        case E::kNotJoined:
          if (!s.in_setup) return 0;
          s.in_setup = false;
          return kCloseHalf;
        case E::kReleased:
          if (s.in_setup) return 0;
          s.phase = P::kGone;
          return kFreeHalf;
        default:
          return 0;
      }
    case P::kGone:
      return event == E::kMade ? kDropHalf : 0;
  }
  return 0;
}

}  // namespace link_step

inline LinkStep step(LinkState state, LinkEvent event) {
  LinkStep out{state};
  if (event != LinkEvent::kPeerEnded) {
    out.actions = link_step::in_phase(out.state, event);
  } else if (state.phase < LinkPhase::kEnded) {
    out.state.phase = LinkPhase::kEnded;
    out.state.word = LinkState::Word::kNone;
    out.actions = state.in_setup ? 0 : kCloseHalf;
  }
  return out;
}

}  // namespace railwire
