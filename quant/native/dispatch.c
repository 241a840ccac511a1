/* Which instruction set runs: the best this processor has, or the one that was asked for. */
#include "kern.h"

#include <stddef.h>
#include <stdio.h>
#include <string.h>

#if defined(__x86_64__) || defined(_M_X64)
static int has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
}
static int has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}
#ifdef WITH_AVXVNNI
#include <cpuid.h>
/* Not every compiler's __builtin_cpu_supports knows AVX-VNNI: leaf 7.1, eax bit 4. */
static int has_avxvnni(void) {
    unsigned a, b, c, d;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif
#endif

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
static int has_dotprod(void) { return getauxval(AT_HWCAP) >> 20 & 1; }
#elif defined(__aarch64__)
static int has_dotprod(void) { return 1; } /* every Apple processor of this kind */
#endif

static int always(void) { return 1; }

static const struct {
    const kern_isa *isa;
    int (*usable)(void);
} table[] = {
#if defined(__x86_64__) || defined(_M_X64)
    {&kern_avx512, has_avx512},
#ifdef WITH_AVXVNNI
    {&kern_avxvnni, has_avxvnni},
#endif
    {&kern_avx2, has_avx2},
#endif
#if defined(__aarch64__)
    {&kern_neon, has_dotprod},
#endif
    {&kern_scalar, always},
};
#define COUNT (sizeof table / sizeof *table)

static const kern_isa *selected;

int kern_interface(void) { return KERN_INTERFACE; }

const char *kern_available(void) {
    static char names[128];
    size_t used = 0;
    for (size_t i = 0; i < COUNT; i++)
        if (table[i].usable())
            used += snprintf(names + used, sizeof names - used, "%s%s", used ? " " : "",
                             table[i].isa->name);
    return names;
}

int kern_select(const char *name) {
    for (size_t i = 0; i < COUNT; i++) {
        if (name && strcmp(name, table[i].isa->name)) continue;
        if (!table[i].usable()) continue;
        selected = table[i].isa;
        return 0;
    }
    return -1;
}

const kern_isa *kern_active(void) {
    if (!selected) kern_select(NULL);
    return selected;
}

const char *kern_selected(void) { return kern_active()->name; }
