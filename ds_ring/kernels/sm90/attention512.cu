// Block attention forward for head_dim 512 on Hopper (sm_90a): fp16 or bf16 in, fp16, bf16 or fp32 out, lse in fp32.
//
// Why a kernel. At head_dim 512 a tile of 64 queries has a 64 x 512 fp32 accumulator: 128 KiB, half of an SM's registers.
// Kernels laid out for 128 spill there, and released ones stop at 256.
//
// Tiles. A cluster of two CTAs owns 128 query rows; keys go in blocks of 128. Each CTA has all 128 rows of Q, computes the
// scores of its half of the keys (64 of the 128), and owns its half of the output's columns (256 of the 512). So nothing is
// loaded twice: a CTA reads K of 64 keys and 256 columns of V of 128 keys, half of what one CTA with 64 rows and all
// columns would, and shared memory, the bound of such a kernel, is written half as often.
//
// Warp roles. 3 warpgroups a CTA. Number 0 loads: a warp each for K and V, for Q (and a previous result into the L2), and
// for tile numbers. Numbers 1 and 2 compute: 64 rows each, with S (64 x 64, 32 registers a thread), P (16, packed) and O
// (64 x 256, 128) in registers. setmaxnreg gives the loaders' registers to them.
//
// Between the CTAs. A warpgroup and its peer, with the same rows in the other CTA, must agree on the rows' maxima and each
// needs the other's P. Both travel as asynchronous stores that arrive as bytes on a barrier of the receiver: maxima as soon
// as the scores are there, P after the exponentials, the sums of P with the first message after a tile. Its own half of P a
// warpgroup feeds to the tensor cores from registers. The peer's message of block n + 1 proves that it is done with what
// it was sent in block n - 1, so two buffers need no further barriers. The two warpgroups of a CTA never meet: they share
// only the slots of the ring.
//
// A step. The scores of the next block are issued, the output of the present one behind them, and the softmax of the next
// runs while the tensor cores work on the output, across the ends of tiles as well.
//
// Barriers. full/empty for each slot of the ring (TMA bytes arrive; eight warps release), Q full by quarters of the
// dimensions and empty by warpgroup, messages and P from the peer, tile numbers full/empty, a request for the next tile.
//
// Shared memory, 227 KiB: Q 128 | ring of 8 slots x 8, K and V in the order of their use | the peer's P 2 buffers x 2 x 8
// | messages 2 | barriers. A K slot is 64 keys x 64 dims, a V slot 16 keys x 256 dims; tiles have the 128-byte swizzle.
//
// Order. CTAs are persistent: rank 0 of a pair draws the next tile from a counter near the end of the present one, under
// causal masks the longest first. Results do not depend on who draws what.
//
// Queries: up to MAXQ chunks (first row, rows, global position), cut into halves of 64 rows; two neighbours in the list of
// a head's halves are a tile, so that at most one half of a head is alone, however many chunks end inside one. Keys: up to 64 segments, each with its own tensor map,
// length and global position. Key j is visible from query i when j <= i by global positions (not causal: always).
// A previous partial result (normalised out, lse; -inf: nothing) is where a tile starts from: its lse is the first
// maximum, its output the first accumulator. It may lie where the new one goes.
//
// compute.cuh: the main loop. softmax.cuh: scores to P, and the peer. state.cuh: from and to memory. loader.cuh: the
// loading warps. shared.cuh: the map of shared memory. tiles.cuh: what is computed in which order. ptx.cuh, wgmma.cuh:
// the chip's instructions. Here: the kernel, its tensor maps and its launch.
#include "compute.cuh"
#include "loader.cuh"

namespace ds_ring {

template <typename T, int NS>
__global__ void __launch_bounds__(384, 1)
    attention512(const __grid_constant__ CUtensorMap queries, const __grid_constant__ Segs<NS> g,
                 const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) uint8_t smem[];
  const uint32_t base = smem_u32(smem);
  if (base & 1023) __trap();  // the swizzled tiles need it, and there is no room to align it by hand
  // the shuffle tells the compiler that the warpgroup index is warp-uniform
  const int wg = __shfl_sync(0xffffffffu, (int)threadIdx.x >> 7, 0), rank = (int)cluster_rank();
  const Barriers bar(base);
  if (threadIdx.x == 0) {
    bar.init();
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    fence_async();
  }
  __syncthreads();
  cluster_sync();
  if (wg == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    if (warp == 0 && lane == 0) load_keys_and_values(base, bar, g, p, rank);
    if (warp == 1) load_queries(base, bar, queries, g, p, rank);
    if (warp == 2 && lane == 0 && rank == 0) draw_tiles(bar, p);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    compute<T>(base, bar, g, p, wg - 1, rank);
  }
  __syncwarp();
  cluster_sync();  // the other CTA may still arrive on our barriers
}

namespace {

typedef CUresult (*EncodeFn)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                             const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                             CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

EncodeFn encode_fn() {
  static EncodeFn fn = [] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult st;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &st) != cudaSuccess ||
        st != cudaDriverEntryPointSuccess)
      f = nullptr;
    return (EncodeFn)f;
  }();
  return fn;
}

// [B, L, H, 512] as the 5-dimensional tensor (64 dims, L, 8 chunks, H, B)
int make_map(CUtensorMap* m, const void* ptr, bool bf16, int B, int L, int H, const long long* st, int rows, int chunks) {
  cuuint64_t dim[5] = {64, (cuuint64_t)L, 8, (cuuint64_t)H, (cuuint64_t)B};
  cuuint64_t str[4] = {(cuuint64_t)st[1] * 2, 128, (cuuint64_t)st[2] * 2, (cuuint64_t)st[0] * 2};
  cuuint32_t box[5] = {64, (cuuint32_t)rows, (cuuint32_t)chunks, 1, 1}, es[5] = {1, 1, 1, 1, 1};
  EncodeFn f = encode_fn();
  if (!f) return 999;
  return (int)f(m, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 5, (void*)ptr, dim, str,
                box, es, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

struct Args {  // mirrored by ds_ring/kernels/attention512.py
  const void* q;
  void* o;
  float* lse;
  const void* po;
  const float* plse;
  int* counter;
  void* stream;
  long long st_q[3], st_o[3], st_lse[2], st_po[3], st_plse[2];  // batch, seq, head (batch, head for lse)
  int B, Hq, Hkv, Lq, n_seg, n_chunk, causal, bf16, out32, prev32, max_ctas;
  float scale;
  const void *k[64], *v[64];
  long long st_k[64][3], st_v[64][3];
  int len[64], koff[64];
  int q_row[MAXQ], q_len[MAXQ], q_off[MAXQ];
};

template <typename T, int NS>
int launch(const Args& a, const Params& p, const CUtensorMap& mq, int grid) {
  auto kern = attention512<T, NS>;
  static cudaError_t attr = cudaFuncSetAttribute(kern, cudaFuncAttributeMaxDynamicSharedMemorySize, SMEM);
  if (attr != cudaSuccess) return (int)attr;
  Segs<NS> g;
  for (int i = 0; i < a.n_seg; ++i) {
    int e = make_map(&g.map[2 * i], a.k[i], a.bf16, a.B, a.len[i], a.Hkv, a.st_k[i], 64, 1);
    if (!e) e = make_map(&g.map[2 * i + 1], a.v[i], a.bf16, a.B, a.len[i], a.Hkv, a.st_v[i], 16, 4);
    if (e) return 10000 + e;
    g.len[i] = a.len[i];
    g.off[i] = a.causal ? a.koff[i] : 0;
  }
  cudaLaunchConfig_t c = {};
  c.gridDim = dim3(grid);
  c.blockDim = dim3(384);
  c.dynamicSmemBytes = SMEM;
  c.stream = (cudaStream_t)a.stream;
  cudaLaunchAttribute at[1];
  at[0].id = cudaLaunchAttributeClusterDimension;
  at[0].val.clusterDim.x = 2;
  at[0].val.clusterDim.y = 1;
  at[0].val.clusterDim.z = 1;
  c.attrs = at;
  c.numAttrs = 1;
  return (int)cudaLaunchKernelEx(&c, kern, mq, g, p);
}

template <typename T>
int launch_t(const Args& a, const Params& p, const CUtensorMap& mq, int grid) {
  return a.n_seg <= 4 ? launch<T, 4>(a, p, mq, grid) : launch<T, 64>(a, p, mq, grid);
}

}  // namespace
}  // namespace ds_ring

extern "C" int attention512_args_size() { return (int)sizeof(ds_ring::Args); }

// Returns 0, a cudaError_t, or 10000 + CUresult when a tensor map could not be made.
extern "C" int attention512_forward(const void* args) {  // an Args
  using namespace ds_ring;
  const Args& a = *(const Args*)args;
  CUtensorMap mq;
  int e;
  if ((e = make_map(&mq, a.q, a.bf16, a.B, a.Lq, a.Hq, a.st_q, BM, 2))) return 10000 + e;
  Params p;
  p.o = a.o;
  p.lse = a.lse;
  p.po = a.po;
  p.plse = a.plse;
  p.counter = a.counter;
  p.o_b = a.st_o[0], p.o_m = a.st_o[1], p.o_h = a.st_o[2];
  p.lse_b = a.st_lse[0], p.lse_h = a.st_lse[1];
  p.po_b = a.st_po[0], p.po_m = a.st_po[1], p.po_h = a.st_po[2];
  p.plse_b = a.st_plse[0], p.plse_h = a.st_plse[1];
  p.Hq = a.Hq;
  p.G = a.Hq / a.Hkv;
  p.n_seg = a.n_seg;
  p.head_halves = 0;
  for (int i = 0; i < a.n_chunk; ++i) {
    p.q_row[i] = a.q_row[i];
    p.q_len[i] = a.q_len[i];
    p.q_off[i] = a.causal ? a.q_off[i] : 1 << 29;
    p.q_halves[i] = (a.q_len[i] + BM - 1) / BM;
    p.head_halves += p.q_halves[i];
  }
  p.n_tiles = (p.head_halves + 1) / 2 * a.Hq * a.B;
  p.reverse = a.causal;
  p.out32 = a.out32;
  p.prev32 = a.prev32;
  p.scale = a.scale;
  p.scale_log2 = a.scale * 1.4426950408889634f;
  const int pairs = a.max_ctas / 2, grid = 2 * (p.n_tiles < pairs ? p.n_tiles : pairs);
  return a.bf16 ? launch_t<__nv_bfloat16>(a, p, mq, grid) : launch_t<__half>(a, p, mq, grid);
}
