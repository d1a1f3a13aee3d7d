// Asynchronous matrix products of a warpgroup (wgmma): B in shared memory, A there or in registers, fp32 accumulators.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace ds_ring {

// "%0, %1, …": the accumulator registers in the text of an instruction, and the operands they stand for.
#define REGS_10(tens) "%" #tens "0, %" #tens "1, %" #tens "2, %" #tens "3, %" #tens "4, %" #tens "5, %" #tens "6, %" \
                      #tens "7, %" #tens "8, %" #tens "9, "
#define REGS_32 REGS_10() REGS_10(1) REGS_10(2) "%30, %31"
#define REGS_128 REGS_10() REGS_10(1) REGS_10(2) REGS_10(3) REGS_10(4) REGS_10(5) REGS_10(6) REGS_10(7) REGS_10(8) \
                 REGS_10(9) REGS_10(10) REGS_10(11) "%120, %121, %122, %123, %124, %125, %126, %127"
#define OUT_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define OUT_16(d, i) OUT_4(d, i), OUT_4(d, i + 4), OUT_4(d, i + 8), OUT_4(d, i + 12)
#define OUT_32(d, i) OUT_16(d, i), OUT_16(d, i + 16)
#define OUT_128(d) OUT_32(d, 0), OUT_32(d, 32), OUT_32(d, 64), OUT_32(d, 96)

// d (+)= a b; a and b are the low words of their descriptors (the high word is the same for every tile: 128-byte swizzle,
// 1024 bytes between groups of 8 rows). d is overwritten where accumulate is 0. A, B: the numbers of the operands that
// follow the accumulator in the instruction's text.
#define WGMMA(shape, type, regs, outs, a_no, b_no, acc_no, high_no, b_transposed)                                    \
  asm volatile("{\n.reg .pred p;\n.reg .b64 da, db;\nsetp.ne.b32 p, %" #acc_no ", 0;\n"                              \
               "mov.b64 da, {%" #a_no ", %" #high_no "};\nmov.b64 db, {%" #b_no ", %" #high_no "};\n"                \
               "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" regs                                 \
               "}, da, db, p, 1, 1, 0, " #b_transposed ";\n}\n"                                                      \
               : outs                                                                                                \
               : "r"(a), "r"(b), "r"(accumulate), "n"(0x40000040))

// The same with A in registers: four words a thread.
#define WGMMA_A_REGS(shape, type, regs, outs, a0_no, a1_no, a2_no, a3_no, b_no, acc_no, high_no, b_transposed)       \
  asm volatile("{\n.reg .pred p;\n.reg .b64 db;\nsetp.ne.b32 p, %" #acc_no ", 0;\n"                                  \
               "mov.b64 db, {%" #b_no ", %" #high_no "};\n"                                                          \
               "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" regs                                 \
               "}, {%" #a0_no ", %" #a1_no ", %" #a2_no ", %" #a3_no "}, db, p, 1, 1, " #b_transposed ";\n}\n"       \
               : outs                                                                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(1), "n"(0x40000040))

template <typename T>
struct Mma;  // qk: S[64x64] (+)= Q[64x16] K[64x16]^T, both K-major. pv: O[64x256] += P[64x16] V[16x256], V N-major,
             // P in shared memory or in registers.

#define DEFINE_MMA(T, type)                                                                                          \
  template <>                                                                                                        \
  struct Mma<T> {                                                                                                    \
    static __device__ __forceinline__ void qk(float (&d)[32], uint32_t a, uint32_t b, int accumulate) {              \
      WGMMA("m64n64k16", type, REGS_32, OUT_32(d, 0), 32, 33, 34, 35, 0);                                            \
    }                                                                                                                \
    static __device__ __forceinline__ void pv(float (&d)[128], uint32_t a, uint32_t b, int accumulate) {             \
      WGMMA("m64n256k16", type, REGS_128, OUT_128(d), 128, 129, 130, 131, 1);                                        \
    }                                                                                                                \
    static __device__ __forceinline__ void pv(float (&d)[128], const uint32_t* a, uint32_t b) {                      \
      WGMMA_A_REGS("m64n256k16", type, REGS_128, OUT_128(d), 128, 129, 130, 131, 132, 133, 134, 1);                  \
    }                                                                                                                \
  };
DEFINE_MMA(__half, "f16")
DEFINE_MMA(__nv_bfloat16, "bf16")
#undef DEFINE_MMA

}  // namespace ds_ring
