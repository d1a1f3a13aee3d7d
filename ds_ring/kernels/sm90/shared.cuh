// The map of shared memory: tiles, messages between the CTAs of a pair, barriers.
#pragma once
#include "ptx.cuh"
#include "tiles.cuh"

namespace ds_ring {

constexpr int D = 512, HALF = D / 2;           // head_dim; output columns of a CTA
constexpr int NSLOT = 8, SLOT = 8192;          // the ring: a K slot is 64 keys x 64 dims, a V slot 16 keys x 256 dims
constexpr uint32_t Q_TILE = BM * D * 2;        // of one warpgroup
constexpr uint32_t P_TILE = BM * 64 * 2;       // 64 rows x the 64 keys of the other CTA
constexpr uint32_t MESSAGE = 512;              // row maxima, then row sums: a pair of floats for each quad of lanes
constexpr uint32_t OFF_Q = 0, OFF_RING = OFF_Q + 2 * Q_TILE, OFF_P = OFF_RING + NSLOT * SLOT,
                   OFF_MESSAGE = OFF_P + 4 * P_TILE, OFF_BARRIERS = OFF_MESSAGE + 4 * MESSAGE;

struct Barriers {  // addresses in shared memory; a CTA's are where its peer's are
  uint32_t full, empty;         // [NSLOT] a slot's bytes are there; 8 warps are done with it
  uint32_t q_full, q_empty;     // [2 warpgroups][4 quarters] of the queries; [2] their last use
  uint32_t message, p;          // [2 buffers][2 warpgroups] bytes from the peer
  uint32_t tile, tile_read;     // [2] a tile number is there; everyone in both CTAs has read it
  uint32_t request;             // the loader asks for the next tile
  uint32_t tile_number;         // [2] (not barriers)
  static constexpr uint32_t COUNT = 2 * NSLOT + 8 + 2 + 4 + 4 + 2 + 2 + 1 + 1;
  __device__ __forceinline__ explicit Barriers(uint32_t base) {
    uint32_t at = base + OFF_BARRIERS;
    auto take = [&](int n) {
      const uint32_t here = at;
      at += 8 * n;
      return here;
    };
    full = take(NSLOT), empty = take(NSLOT), q_full = take(8), q_empty = take(2), message = take(4), p = take(4);
    tile = take(2), tile_read = take(2), request = take(1), tile_number = take(1);
  }
  __device__ __forceinline__ void init() const {
    constexpr int READERS = 2 * (2 + 8);  // in each CTA: two loading warps, eight computing ones
    auto set = [](uint32_t bar, int n, int count) {
      for (int i = 0; i < n; ++i) mbar_init(bar + 8 * i, count);
    };
    set(full, NSLOT, 1), set(empty, NSLOT, 8), set(q_full, 8, 1), set(q_empty, 2, 4), set(message, 4, 1), set(p, 4, 1);
    set(tile, 2, 1), set(tile_read, 2, READERS), set(request, 1, 1);
  }
};

constexpr uint32_t SMEM = OFF_BARRIERS + 8 * Barriers::COUNT;
static_assert(SMEM <= 232448, "over the 227 KiB limit");

// Tile numbers, as every role reads them: by one thread, or by a whole warp.
struct TileReader {
  uint32_t tile, number, read0;  // read0: the barrier of CTA 0
  int count = 0;
  __device__ __forceinline__ explicit TileReader(const Barriers& bar)
      : tile(bar.tile), number(bar.tile_number), read0(mapa(bar.tile_read, 0)) {}
  template <bool WARP>
  __device__ __forceinline__ int next() {
    const int slot = count & 1;
    mbar_wait_cluster(tile + 8 * slot, (count >> 1) & 1);
    const int t = (int)ld_shared(number + 4 * slot);
    if (WARP) __syncwarp();
    if (!WARP || (threadIdx.x & 31) == 0) mbar_arrive_cluster(read0 + 8 * slot);
    ++count;
    return t;
  }
};

}  // namespace ds_ring
