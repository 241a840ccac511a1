/* AVX2, FMA, F16C. */
#include "vec256.h"

const kern_isa kern_avx2 = KERNELS("avx2");
