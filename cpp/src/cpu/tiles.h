// SPDX-License-Identifier: Apache-2.0
// Tile sizes, each with the limit that sets it. L queries in the lanes of NV vectors make a tile; a task owns
// up to kTaskRows rows and walks all keys in blocks of kKeys.
#pragma once

#include "cpu/tile-unit-inl.h"

namespace qkv::inline QKV_LEVEL {

// Keys per block. The score tile (kKeys x L, 12 KiB for 32 lanes of float) lies in L1 beside the Q^T or O^T tile
// (16 KiB at D = 128); a multiple of the 12-row micro-kernel and of the 32-bit mask words. Blocks start at
// multiples of kKeys, so that the arithmetic of a row never depends on what shares its tile. With tile registers the
// products are so fast that reading and writing O once per block shows: twice as many keys, 24 KiB.
constexpr int kKeys = kTileUnit ? 192 : 96;
constexpr int kMaskWords = kKeys / 32;

// Vectors per tile, at most. Four of double at AVX-512 are 32 lanes as well: K and V are twice the bytes of float's,
// and a tile of two would read them from L2 at twice the rate. Its scores (24 KiB) and O^T or Q^T (32 KiB at D = 128)
// still pass L1. Four of float at AVX2 take a tenth fewer instructions for the same fma, which counts where another
// thread shares the core (1.03 to 1.3 times as fast then, else 1.0).
template <class A>
constexpr int kTileVectors = kVectorBytes == 8 * sizeof(A) ? 4 : 2;

// Keys per block of tiles of one vector: the rows are few, memory is their limit, and what is next is asked for a block
// before. In larger blocks it would leave L1 in between.
template <int NV>
constexpr int kBlockKeys = NV == 1 ? 96 : kKeys;
static_assert(kKeys % kBlockKeys<1> == 0 && kBlockKeys<1> % 32 == 0);

// Rows per task, at most: what comes from beyond L2 (at D = 128 K and V of 2048 keys are 2 MiB) is used for so many
// rows (8 tiles of 32 lanes). A task takes fewer where threads would otherwise go idle.
constexpr int kTaskRows = kTileUnit ? 512 : 256;
constexpr int kLeastTaskRows = 32;

// Up to so many rows (a decoding step) the products run with head_dim in the lanes instead (few-inl.h). At AVX2 a tile
// of one vector has too few chains of fma: more than half a vector of rows, too (1.0 to 1.5 times as fast; 0.83 to 0.88
// for keys of one block, but by rows alone, so that no bit tells how many keys are hidden).
template <class A>
constexpr int kFewRows = kVectorBytes == 32 ? kLanes<A> : kLanes<A> / 2;
constexpr int kFewTileRows = 4;  // and of bfloat16 where tile registers take 16 rows for the price of one

// Up to kPartRows rows, the keys are cut into parts for threads to share (parts-inl.h): kPartKeys or more, twice as
// many with more than few rows. 768 KiB of K and V at D = 128 in float: long against the cost of a task, short enough
// that two threads share 4096 keys evenly. From kMaxParts on parts grow instead, which bounds the memory for their
// results.
constexpr int kPartRows = 64;
constexpr int kPartKeys = 768;
static_assert(kPartKeys % kKeys == 0);
constexpr int kMaxParts = 64;

// Blocks of keys at the end of a task that also bring in what comes after it (closing-inl.h).
constexpr int kClosingBlocks = 6;

// Lazy rescaling: the running maximum moves only when the scores rise by more than this (log2 units), so p stays
// below 2^8 and O is rescaled a few times per row instead of once per block. Exact: only the common factor moves.
constexpr int kLazyLog2 = 8;

}  // namespace qkv::inline QKV_LEVEL
