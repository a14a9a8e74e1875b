// The 32 bits that travel with a write: 22 bits of counter id, 10 bits of weight (docs/guarantees.md explains why).
//
// The weight is 1..1024 sixteenths of an arrival, stored minus one. A write is one arrival (16 units), also when it is
// striped into up to 16 WRs whose weights sum to 16; up to 64 merged pages are one WR of weight 16 * pages. The
// receiver only ever adds units, so neither order nor striping nor merging shows in the count. Where order is known,
// the last of several WRs carries the weight of all (gather_immediates in work.h).
#pragma once

#include <cstdint>

namespace railwire {

inline constexpr uint32_t kUnitsPerArrival = 16;
inline constexpr uint32_t kMaxWeight = 1024;
inline constexpr uint32_t kMaxMergedPages = kMaxWeight / kUnitsPerArrival;
inline constexpr uint32_t kImmediateIds = 1u << 22;

constexpr uint32_t encode_immediate(uint32_t id, uint32_t weight) { return id << 10 | (weight - 1); }
constexpr uint32_t immediate_id(uint32_t immediate) { return immediate >> 10; }
constexpr uint32_t immediate_weight(uint32_t immediate) { return (immediate & 1023u) + 1; }

}  // namespace railwire
