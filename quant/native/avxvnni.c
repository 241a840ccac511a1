/* AVX2 with the 256-bit dot products of AVX-VNNI. */
#define WITH_VNNI
#include "vec256.h"

const kern_isa kern_avxvnni = KERNELS("avxvnni");
