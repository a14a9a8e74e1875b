// How one piece is copied by a team of lanes: the arithmetic of the copy kernel (copy.cu), and of nothing else.
// Compiles for the host too, where the tests run it lane by lane.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define RAILWIRE_LANE __device__ __forceinline__
#else
#define RAILWIRE_LANE inline
#endif

namespace railwire::cuda {

struct Piece {
  uint64_t source;
  uint64_t destination;
  uint64_t length;
};

struct alignas(16) Word {
  uint32_t part[4];
};

RAILWIRE_LANE Word load_word(const Word* from) {
#ifdef __CUDACC__
  const uint4 value = __ldcs(reinterpret_cast<const uint4*>(from));
  return {{value.x, value.y, value.z, value.w}};
#else
  return *from;
#endif
}

RAILWIRE_LANE void store_word(Word* to, const Word& word) {
#ifdef __CUDACC__
  *reinterpret_cast<uint4*>(to) = make_uint4(word.part[0], word.part[1], word.part[2], word.part[3]);
#else
  *to = word;
#endif
}

// The low half of high:low shifted right by `bits` (0 to 31).
RAILWIRE_LANE uint32_t funnel(uint32_t low, uint32_t high, uint32_t bits) {
#ifdef __CUDACC__
  return __funnelshift_r(low, high, bits);
#else
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> bits);
#endif
}

// 16 bytes that begin 4 * kParts + bits / 8 bytes into the pair first, second.
template <int kParts>
RAILWIRE_LANE Word join(const Word& first, const Word& second, uint32_t bits) {
  const uint32_t all[9] = {first.part[0],  first.part[1],  first.part[2],
                           first.part[3],  second.part[0], second.part[1],
                           second.part[2], second.part[3], 0};
  Word out;
  for (int i = 0; i < 4; ++i) out.part[i] = funnel(all[kParts + i], all[kParts + i + 1], bits);
  return out;
}

inline constexpr uint32_t kUnroll = 8;  // words that a lane has under way at once

// `words` words to an aligned destination. The source begins `kParts` quarter words and `bits` bits into `from`, which
// is aligned; where it begins there exactly, each word is one load.
template <int kParts, bool kExact>
RAILWIRE_LANE void copy_words(const Word* from, Word* to, uint64_t words, uint32_t bits, uint32_t lane,
                              uint32_t lanes) {
  constexpr uint32_t kStep = kExact ? kUnroll : kUnroll / 2;
  uint64_t i = lane;
  for (; i + uint64_t{kStep - 1} * lanes < words; i += uint64_t{kStep} * lanes) {
    Word value[kStep];
    for (uint32_t k = 0; k < kStep; ++k) value[k] = load_word(from + i + uint64_t{k} * lanes);
    if constexpr (!kExact) {
      Word next[kStep];
      for (uint32_t k = 0; k < kStep; ++k) next[k] = load_word(from + i + uint64_t{k} * lanes + 1);
      for (uint32_t k = 0; k < kStep; ++k) value[k] = join<kParts>(value[k], next[k], bits);
    }
    for (uint32_t k = 0; k < kStep; ++k) store_word(to + i + uint64_t{k} * lanes, value[k]);
  }
  for (; i < words; i += lanes) {
    Word value = load_word(from + i);
    if constexpr (!kExact) value = join<kParts>(value, load_word(from + i + 1), bits);
    store_word(to + i, value);
  }
}

// Lane `lane` of `lanes` (at least 16) does its share. Any alignment of either side: bytes until the destination is
// aligned to 16, then words, then bytes. Words of a source of another alignment are joined from two aligned loads; no
// aligned word is read that holds no byte of the source.
RAILWIRE_LANE void copy_piece(const Piece& piece, uint32_t lane, uint32_t lanes) {
  const auto* source = reinterpret_cast<const unsigned char*>(piece.source);
  auto* destination = reinterpret_cast<unsigned char*>(piece.destination);
  uint64_t length = piece.length;
  uint64_t head = (16 - (piece.destination & 15)) & 15;
  if (head > length) head = length;
  if (lane < head) destination[lane] = source[lane];
  source += head;
  destination += head;
  length -= head;
  const uint64_t words = length / 16;
  const uint32_t tail = static_cast<uint32_t>(length & 15);
  const uint32_t skew = static_cast<uint32_t>(reinterpret_cast<uint64_t>(source) & 15);
  const auto* from = reinterpret_cast<const Word*>(source - skew);
  auto* to = reinterpret_cast<Word*>(destination);
  const uint32_t bits = 8 * (skew & 3);
  if (skew == 0) {
    copy_words<0, true>(from, to, words, 0, lane, lanes);
  } else if (skew < 4) {
    copy_words<0, false>(from, to, words, bits, lane, lanes);
  } else if (skew < 8) {
    copy_words<1, false>(from, to, words, bits, lane, lanes);
  } else if (skew < 12) {
    copy_words<2, false>(from, to, words, bits, lane, lanes);
  } else {
    copy_words<3, false>(from, to, words, bits, lane, lanes);
  }
  if (lane < tail) destination[16 * words + lane] = source[16 * words + lane];
}

}  // namespace railwire::cuda
