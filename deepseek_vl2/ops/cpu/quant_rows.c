/* Products of few rows with packed weights of 4 and 8 bits on a CPU. See quant_rows.py.

   A row is quantized to int8 with a scale for 32 columns, so that products are of integers (vpdpbusd, or vpmaddubsw
   where there is none): a word of 32 bits holds eight weights of 4 bits or four of 8, and becomes one lane of 32 bits,
   which is then scaled in float32. For 4 bits the row is split into its even and its odd columns, as the lower and the
   upper halves of the bytes are. Both kinds of weights are multiplied as unsigned numbers, 8 or 128 too large; what
   that adds is known from the row alone, and lanes begin at its negative.

   Four rows of weights are read at a time: what the row gives (numbers, scales, starts) is loaded once for all, and
   their sums are independent. But the CPU's own fetching ahead follows one stream and not four: without more, memory
   gives half of what it could. So lines are asked for in the order in which they lie, far enough ahead that the last of
   the four rows is on its way before it is read, and into the second level of the cache, which has more room. */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define WORDS 16 /* of a vector */
#else
#define WORDS 8
#endif
#define BLOCK 32 /* columns of the row that share a scale */
#define TOGETHER 4 /* rows of weights */
#define ROWS_AT_A_TIME 32
#define MOST_TOKENS 32
#define BYTES_AHEAD 8192 /* beyond the rows that are read together */
#define INLINE static inline __attribute__((always_inline))

enum { INT8 = 0 }; /* the shift that stands for 8 bits */

INLINE float widen(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

INLINE uint16_t narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)((bits >> 16) | 0x40); /* NaN */
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE float rounded(float value) { return widen(narrow(value)); }

/* ---------------------------------------------------------------- the row */

/* A quantized row. For 4 bits `numbers` holds the even columns and `odd` the odd ones. */
typedef struct {
    int8_t *numbers, *odd;
    int32_t *start; /* of each lane: minus what the offset of the weights adds */
    float *scale;   /* of each lane */
} Row;

/* A packed matrix of `width` columns. A scale is of 8 << shift columns; of 8 bits, shift is INT8, it is of a row. */
typedef struct {
    const char *weight;
    const uint16_t *scale;
    int64_t width;
    int shift;
} Matrix;

INLINE int64_t words_of(int64_t width, int shift) { return shift == INT8 ? width / 4 : width / 8; }

INLINE int64_t padded_words(int64_t width, int shift) {
    return (words_of(width, shift) + WORDS - 1) / WORDS * WORDS;
}

/* Bytes of a row: a multiple of 64, as vectors are to lie within a line of the cache. */
INLINE size_t row_bytes(int64_t width, int shift) {
    return (padded_words(width, shift) * (shift == INT8 ? 12 : 16) + 63) / 64 * 64;
}

INLINE Row place_row(char *memory, int64_t width, int shift) {
    int64_t words = padded_words(width, shift);
    Row row = {.scale = (float *)memory, .start = (int32_t *)memory + words, .numbers = (int8_t *)memory + 8 * words};
    row.odd = row.numbers + 4 * words;
    return row;
}

/* The largest of 32 sizes, as bits: a NaN is larger than all numbers. */
INLINE uint16_t largest_bits(const uint16_t *x) {
    uint16_t most = 0;
    for (int i = 0; i < BLOCK; i++) {
        uint16_t size = x[i] & 0x7fff;
        most = size > most ? size : most;
    }
    return most;
}

/* 8 numbers of bfloat16 as integers of 32 bits, once they are multiplied. */
INLINE __m256i eight(const uint16_t *x, __m256 factor) {
    __m256i bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)x)), 16);
    return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_castsi256_ps(bits), factor));
}

INLINE void quantize_block(const uint16_t *x, int shift, Row row, int64_t first) {
    const float largest = widen(largest_bits(x));
    int usual = largest >= 1e-36f && largest <= 3.4e38f; /* others: NaN, or so small that its inverse is none */
    __m256 factor = _mm256_set1_ps(usual ? 127 / largest : 0);
    __m256i low = _mm256_packs_epi32(eight(x, factor), eight(x + 8, factor));
    __m256i high = _mm256_packs_epi32(eight(x + 16, factor), eight(x + 24, factor));
    /* Packing works within halves: words of four numbers come as 0, 2, 4, 6, 1, 3, 5, 7. */
    __m256i numbers = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    if (!usual) numbers = _mm256_setzero_si256();
    __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), numbers);
    __m256i sums = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    float scale = largest < 1e-36f ? 0 : largest / 127;
    if (shift == INT8) {
        _mm256_storeu_si256((__m256i *)(row.numbers + first), numbers);
        _mm256_storeu_si256((__m256i *)(row.start + first / 4), _mm256_slli_epi32(_mm256_sub_epi32(_mm256_setzero_si256(), sums), 7));
        _mm256_storeu_ps(row.scale + first / 4, _mm256_set1_ps(scale));
        return;
    }
    const __m256i split = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6, 8, 10, 12, 14,
                                           1, 3, 5, 7, 9, 11, 13, 15);
    __m256i parts = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(numbers, split), 0xd8);
    _mm_storeu_si128((__m128i *)(row.numbers + first / 2), _mm256_castsi256_si128(parts));
    _mm_storeu_si128((__m128i *)(row.odd + first / 2), _mm256_extracti128_si256(parts, 1));
    __m128i words = _mm_hadd_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    _mm_storeu_si128((__m128i *)(row.start + first / 8), _mm_slli_epi32(_mm_sub_epi32(_mm_setzero_si128(), words), 3));
    _mm_storeu_ps(row.scale + first / 8, _mm_set1_ps(scale));
}

/* Quantize a row of bfloat16. Lanes behind its last column are zero. */
static void quantize_row(const uint16_t *x, int64_t width, int shift, Row row) {
    int64_t first = 0, padded = padded_words(width, shift) * (shift == INT8 ? 4 : 8);
    for (; first + BLOCK <= width; first += BLOCK) quantize_block(x + first, shift, row, first);
    for (; first < padded; first += BLOCK) {
        uint16_t rest[BLOCK] = {0};
        if (first < width) memcpy(rest, x + first, (width - first) * sizeof *x);
        quantize_block(rest, shift, row, first);
    }
}

/* ---------------------------------------------------------------- vectors */

/* Where the bytes of a float come from among the scales of a vector, for each shift: the lower half is zero. */
#define LANE(shift, lane) -1, -1, 2 * ((lane) >> (shift)), 2 * ((lane) >> (shift)) + 1
#define FOUR(shift, lane) LANE(shift, lane), LANE(shift, lane + 1), LANE(shift, lane + 2), LANE(shift, lane + 3)
#define LANES(shift) FOUR(shift, 0), FOUR(shift, 4), FOUR(shift, 8), FOUR(shift, 12)
static const int8_t PLACES[5][64] __attribute__((aligned(64))) = {{0}, {LANES(1)}, {LANES(2)}, {LANES(3)}, {LANES(4)}};

#if WORDS == 16
typedef __m512 floats;
typedef __m512i integers;
INLINE integers load(const void *at) { return _mm512_loadu_si512(at); }
INLINE integers load_first(const void *at, int64_t words) {
    return _mm512_maskz_loadu_epi32((__mmask16)((1u << words) - 1), at);
}
INLINE floats load_floats(const float *at) { return _mm512_loadu_ps(at); }
INLINE integers products_of_4(integers words, integers even, integers odd, integers start) {
    const integers low = _mm512_set1_epi8(15);
    integers sum = _mm512_dpbusd_epi32(start, _mm512_and_si512(words, low), even);
    return _mm512_dpbusd_epi32(sum, _mm512_and_si512(_mm512_srli_epi16(words, 4), low), odd);
}
INLINE integers products_of_8(integers words, integers numbers, integers start) {
    return _mm512_dpbusd_epi32(start, _mm512_xor_si512(words, _mm512_set1_epi8((char)128)), numbers);
}
INLINE floats spread(const uint16_t *scales, int shift) {
    integers few;
    uint64_t four;
    uint32_t two;
    if (shift == 1) few = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)scales));
    if (shift == 2) memcpy(&four, scales, 8), few = _mm512_set1_epi64((long long)four);
    if (shift == 3) memcpy(&two, scales, 4), few = _mm512_set1_epi32((int)two);
    if (shift == 4) few = _mm512_set1_epi16((short)*scales);
    return _mm512_castsi512_ps(_mm512_shuffle_epi8(few, load(PLACES[shift])));
}
#define AS_FLOATS(numbers) _mm512_cvtepi32_ps(numbers)
#define TIMES(a, b) _mm512_mul_ps(a, b)
#define ADD_PRODUCT(a, b, sum) _mm512_fmadd_ps(a, b, sum)
#define ZERO _mm512_setzero_ps()
INLINE __m256 halved(floats lanes) {
    return _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
}
#else
typedef __m256 floats;
typedef __m256i integers;
INLINE integers load(const void *at) { return _mm256_loadu_si256((const __m256i *)at); }
INLINE integers load_first(const void *at, int64_t words) {
    integers lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_epi32((const int *)at, _mm256_cmpgt_epi32(_mm256_set1_epi32((int)words), lanes));
}
INLINE floats load_floats(const float *at) { return _mm256_loadu_ps(at); }
INLINE integers add_pairs(integers sum, integers pairs) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
INLINE integers products_of_4(integers words, integers even, integers odd, integers start) {
    const integers low = _mm256_set1_epi8(15);
    integers lower = _mm256_maddubs_epi16(_mm256_and_si256(words, low), even);
    integers upper = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(words, 4), low), odd);
    return add_pairs(start, _mm256_add_epi16(lower, upper));
}
INLINE integers products_of_8(integers words, integers numbers, integers start) {
    /* Sizes of the weights times the row with their signs: unsigned as above, pairs would overflow 16 bits. */
    (void)start;
    integers signed_row = _mm256_sign_epi8(numbers, words);
    return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(words), signed_row), _mm256_set1_epi16(1));
}
INLINE floats spread(const uint16_t *scales, int shift) {
    integers few;
    uint64_t four;
    uint32_t two;
    if (shift == 1) memcpy(&four, scales, 8), few = _mm256_set1_epi64x((long long)four);
    if (shift == 2) memcpy(&two, scales, 4), few = _mm256_set1_epi32((int)two);
    if (shift >= 3) few = _mm256_set1_epi16((short)*scales);
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(few, load(PLACES[shift])));
}
#define AS_FLOATS(numbers) _mm256_cvtepi32_ps(numbers)
#define TIMES(a, b) _mm256_mul_ps(a, b)
#define ADD_PRODUCT(a, b, sum) _mm256_fmadd_ps(a, b, sum)
#define ZERO _mm256_setzero_ps()
INLINE __m256 halved(floats lanes) { return lanes; }
#endif

/* The sums of the lanes of one vector, or of four. */
INLINE void totals(const floats *lanes, int count, float *out) {
    __m256 first = halved(lanes[0]);
    if (count == 1) {
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(first), _mm256_extractf128_ps(first, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        *out = _mm_cvtss_f32(half) + _mm_cvtss_f32(_mm_movehdup_ps(half));
        return;
    }
    __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(first, halved(lanes[1])), _mm256_hadd_ps(halved(lanes[2]), halved(lanes[3])));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}

/* ---------------------------------------------------------------- products */

INLINE floats spread_first(const uint16_t *scales, int shift, int64_t words) {
    uint16_t few[8] = {0};
    int64_t count = (words + (1 << shift) - 1) >> shift;
    for (int64_t i = 0; i < count; i++) few[i] = scales[i];
    return spread(few, shift);
}

/* Products of the quantized row with rows of a matrix, one or TOGETHER, from `first` on. */
INLINE void dots(Matrix m, int shift, int count, int64_t first, Row row, float *out) {
    const int64_t words = words_of(m.width, shift), scales = shift == INT8 ? 1 : words >> shift;
    const char *weight = m.weight + first * words * 4;
    const uint16_t *scale = m.scale + first * scales;
    const char *ahead = weight + count * words * 4 + BYTES_AHEAD;
    floats sums[TOGETHER];
    for (int k = 0; k < count; k++) sums[k] = ZERO;
    for (int64_t word = 0; word < words; word += WORDS) {
        const int64_t left = words - word;
        const integers numbers = load(row.numbers + 4 * word), start = load(row.start + word);
        const integers odd = shift == INT8 ? numbers : load(row.odd + 4 * word);
        const floats row_scale = load_floats(row.scale + word);
#pragma GCC unroll 4
        for (int k = 0; k < count; k++) {
            const char *at = weight + (k * words + word) * 4;
            __builtin_prefetch(ahead + (word * count + k * WORDS) * 4, 0, 2);
            integers part = left >= WORDS ? load(at) : load_first(at, left);
            if (shift == INT8) {
                sums[k] = ADD_PRODUCT(AS_FLOATS(products_of_8(part, numbers, start)), row_scale, sums[k]);
                continue;
            }
            const uint16_t *its = scale + k * scales + (word >> shift);
            floats weight_scale = left >= WORDS ? spread(its, shift) : spread_first(its, shift, left);
            floats products = TIMES(AS_FLOATS(products_of_4(part, numbers, odd, start)), row_scale);
            sums[k] = ADD_PRODUCT(products, weight_scale, sums[k]);
        }
    }
    totals(sums, count, out);
    if (shift == INT8)
        for (int k = 0; k < count; k++) out[k] *= widen(scale[k]);
}

INLINE void dots_of_kind(Matrix m, int shift, int64_t first, int64_t end, Row row, float *out) {
    int64_t r = first;
    for (; r + TOGETHER <= end; r += TOGETHER) dots(m, shift, TOGETHER, r, row, out + r - first);
    for (; r < end; r++) dots(m, shift, 1, r, row, out + r - first);
}

/* out[end - first]: products of the quantized row with rows of a matrix. */
static void dot_rows(Matrix m, int64_t first, int64_t end, Row row, float *out) {
    switch (m.shift) {
    case 1: dots_of_kind(m, 1, first, end, row, out); break;
    case 2: dots_of_kind(m, 2, first, end, row, out); break;
    case 3: dots_of_kind(m, 3, first, end, row, out); break;
    case 4: dots_of_kind(m, 4, first, end, row, out); break;
    default: dots_of_kind(m, INT8, first, end, row, out);
    }
}

/* The same for several quantized rows, to out[tokens][ROWS_AT_A_TIME]: weights come from memory once. */
INLINE void dot_block(Matrix m, int64_t first, int64_t end, const char *rows, size_t step, int64_t tokens,
                      float (*out)[ROWS_AT_A_TIME]) {
    for (int64_t t = 0; t < tokens; t++)
        dot_rows(m, first, end, place_row((char *)rows + t * step, m.width, m.shift), out[t]);
}

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Quantized rows, one after the other; NULL where there is no memory. */
static char *quantize_rows(const uint16_t *x, int64_t tokens, int64_t width, int shift) {
    size_t step = row_bytes(width, shift);
    char *rows = aligned_alloc(64, tokens * step + 64);
    if (rows)
        for (int64_t t = 0; t < tokens; t++) quantize_row(x + t * width, width, shift, place_row(rows + t * step, width, shift));
    return rows;
}

/* out[tokens, rows] = x[tokens, width] weight[rows, width]^T + bias[rows]; bias may be NULL. */
int packed_linear(const uint16_t *x, const char *weight, const uint16_t *scale, const uint16_t *bias, uint16_t *out,
                  int64_t tokens, int64_t rows, int64_t width, int shift, int threads) {
    char *quantized = quantize_rows(x, tokens, width, shift);
    if (!quantized) return 1;
    Matrix m = {weight, scale, width, shift};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t first = 0; first < rows; first += ROWS_AT_A_TIME) {
        int64_t end = smaller(first + ROWS_AT_A_TIME, rows);
        float sums[MOST_TOKENS][ROWS_AT_A_TIME];
        dot_block(m, first, end, quantized, row_bytes(width, shift), tokens, sums);
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t r = first; r < end; r++)
                out[t * rows + r] = narrow(sums[t][r - first] + (bias ? widen(bias[r]) : 0));
    }
    free(quantized);
    return 0;
}

/* x cos + rotate_half(x) sin of one head, in place, each product and the sum rounded. */
static void rotate(uint16_t *x, const uint16_t *cosine, const uint16_t *sine, int64_t size) {
    int64_t half = size / 2;
    for (int64_t i = 0; i < half; i++) {
        float first = widen(x[i]), second = widen(x[i + half]);
        x[i] = narrow(rounded(first * widen(cosine[i])) + rounded(-second * widen(sine[i])));
        x[i + half] = narrow(rounded(second * widen(cosine[i + half])) + rounded(first * widen(sine[i + half])));
    }
}

/* out[tokens, queries + 2 * keys]: queries, keys and values of rows x[tokens, width]; heads of queries and keys are
   rotated by angles [tokens, size]. */
int packed_queries_keys_values(const uint16_t *x, const char *query, const uint16_t *query_scale, const char *key,
                               const uint16_t *key_scale, const char *value, const uint16_t *value_scale,
                               const uint16_t *cosine, const uint16_t *sine, uint16_t *out, int64_t tokens,
                               int64_t queries, int64_t keys, int64_t width, int64_t size, int shift, int threads) {
    char *quantized = quantize_rows(x, tokens, width, shift);
    if (!quantized) return 1;
    const int64_t counts[] = {queries, keys, keys}, starts[] = {0, queries, queries + keys}, all = queries + 2 * keys;
    const Matrix matrices[] = {{query, query_scale, width, shift}, {key, key_scale, width, shift}, {value, value_scale, width, shift}};
#pragma omp parallel num_threads(threads)
    {
        for (int part = 0; part < 3; part++) {
#pragma omp for schedule(static) nowait
            for (int64_t first = 0; first < counts[part]; first += ROWS_AT_A_TIME) {
                int64_t end = smaller(first + ROWS_AT_A_TIME, counts[part]);
                float sums[MOST_TOKENS][ROWS_AT_A_TIME];
                dot_block(matrices[part], first, end, quantized, row_bytes(width, shift), tokens, sums);
                for (int64_t t = 0; t < tokens; t++)
                    for (int64_t r = first; r < end; r++) out[t * all + starts[part] + r] = narrow(sums[t][r - first]);
            }
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t h = 0; h < tokens * ((queries + keys) / size); h++) {
            int64_t heads = (queries + keys) / size, t = h / heads;
            rotate(out + t * all + h % heads * size, cosine + t * size, sine + t * size, size);
        }
    }
    free(quantized);
    return 0;
}

/* A SwiGLU MLP: down (silu(gate x) * up x). */
typedef struct {
    Matrix gate, up, down;
    int64_t first, end; /* its picks */
} Expert;

/* A token that goes through an expert. */
typedef struct {
    int64_t token;
    float weight;
} Pick;

/* What experts make of the rows of x: middle[picks, inner], in bfloat16, every step rounded. */
INLINE void gated_block(Expert e, int64_t first, int64_t end, const char *rows, size_t step, const Pick *picks,
                        uint16_t *middle, int64_t inner) {
    for (int64_t p = e.first; p < e.end; p++) {
        Row row = place_row((char *)rows + picks[p].token * step, e.gate.width, e.gate.shift);
        float gate[ROWS_AT_A_TIME], up[ROWS_AT_A_TIME];
        dot_rows(e.gate, first, end, row, gate);
        dot_rows(e.up, first, end, row, up);
        for (int64_t r = first; r < end; r++) {
            float g = rounded(gate[r - first]);
            middle[p * inner + r] = narrow(rounded(g / (1 + expf(-g))) * rounded(up[r - first]));
        }
    }
}

/* out[tokens, hidden]: the weighted sum of what each token's experts make of it, in float32, products rounded. */
static int swiglu(const uint16_t *x, int64_t tokens, const Expert *experts, int64_t count, const Pick *picks,
                  int64_t inner, int64_t hidden, uint16_t *out, int threads) {
    const int64_t chosen = experts[count - 1].end, blocks = (inner + ROWS_AT_A_TIME - 1) / ROWS_AT_A_TIME;
    const int shift = experts->gate.shift, down_shift = experts->down.shift;
    const size_t step = row_bytes(hidden, shift), down_step = row_bytes(inner, down_shift);
    char *rows = quantize_rows(x, tokens, hidden, shift), *middles = aligned_alloc(64, chosen * down_step + 64);
    uint16_t *middle = malloc(chosen * inner * sizeof *middle + 1);
    const int failed = !rows || !middles || !middle;
    if (!failed) {
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (int64_t b = 0; b < count * blocks; b++) {
                int64_t first = b % blocks * ROWS_AT_A_TIME, end = smaller(first + ROWS_AT_A_TIME, inner);
                gated_block(experts[b / blocks], first, end, rows, step, picks, middle, inner);
            }
#pragma omp for schedule(static)
            for (int64_t p = 0; p < chosen; p++)
                quantize_row(middle + p * inner, inner, down_shift, place_row(middles + p * down_step, inner, down_shift));
#pragma omp for schedule(static)
            for (int64_t first = 0; first < hidden; first += ROWS_AT_A_TIME) {
                int64_t end = smaller(first + ROWS_AT_A_TIME, hidden);
                float sums[MOST_TOKENS][ROWS_AT_A_TIME];
                memset(sums, 0, tokens * sizeof *sums);
                for (const Expert *e = experts; e < experts + count; e++)
                    for (int64_t p = e->first; p < e->end; p++) {
                        float down[ROWS_AT_A_TIME];
                        dot_rows(e->down, first, end, place_row(middles + p * down_step, inner, down_shift), down);
                        for (int64_t r = 0; r < end - first; r++)
                            sums[picks[p].token][r] += picks[p].weight * rounded(down[r]);
                    }
                for (int64_t t = 0; t < tokens; t++)
                    for (int64_t r = first; r < end; r++) out[t * hidden + r] = narrow(sums[t][r - first]);
            }
        }
    }
    free(rows);
    free(middles);
    free(middle);
    return failed;
}

/* out[tokens, hidden]: a SwiGLU MLP of matrices gate and up [inner, hidden] and down [hidden, inner]. */
int packed_mlp(const uint16_t *x, const char *gate, const uint16_t *gate_scale, const char *up,
               const uint16_t *up_scale, const char *down, const uint16_t *down_scale, uint16_t *out, int64_t tokens,
               int64_t inner, int64_t hidden, int shift, int down_shift, int threads) {
    Pick picks[MOST_TOKENS];
    for (int64_t t = 0; t < tokens; t++) picks[t] = (Pick){t, 1};
    Expert one = {{gate, gate_scale, hidden, shift}, {up, up_scale, hidden, shift}, {down, down_scale, inner, down_shift}, 0, tokens};
    return swiglu(x, tokens, &one, 1, picks, inner, hidden, out, threads);
}

/* The chosen ones of matrices gate_up [2 inner, hidden] and down [hidden, inner] that lie one after the other, in their
   order, and the picks of each; returns how many. */
static int64_t group_picks(const char *gate_up, const uint16_t *gate_up_scale, const char *down,
                           const uint16_t *down_scale, const int64_t *ids, const float *weights, int64_t tokens,
                           int64_t top_k, int64_t all, int64_t inner, int64_t hidden, int shift, int down_shift,
                           Expert *experts, Pick *picks) {
    const int64_t row = words_of(hidden, shift) * 4, down_row = words_of(inner, down_shift) * 4;
    const int64_t scales = shift == INT8 ? 1 : words_of(hidden, shift) >> shift;
    const int64_t down_scales = down_shift == INT8 ? 1 : words_of(inner, down_shift) >> down_shift;
    int64_t count = 0, chosen = 0;
    for (int64_t e = 0; e < all; e++) {
        int64_t first = chosen;
        for (int64_t i = 0; i < tokens * top_k; i++)
            if (ids[i] == e) picks[chosen++] = (Pick){i / top_k, weights[i]};
        if (chosen == first) continue;
        const char *gate = gate_up + e * 2 * inner * row;
        const uint16_t *gate_scale = gate_up_scale + e * 2 * inner * scales;
        experts[count++] = (Expert){{gate, gate_scale, hidden, shift},
                                    {gate + inner * row, gate_scale + inner * scales, hidden, shift},
                                    {down + e * hidden * down_row, down_scale + e * hidden * down_scales, inner, down_shift},
                                    first,
                                    chosen};
    }
    return count;
}

/* out[tokens, hidden]: the sum over top_k of weights[t, k] times what expert ids[t, k] of `all` makes of row t. Returns 2
   where an id is none. */
int packed_experts(const uint16_t *x, const char *gate_up, const uint16_t *gate_up_scale, const char *down,
                   const uint16_t *down_scale, const int64_t *ids, const float *weights, uint16_t *out, int64_t tokens,
                   int64_t top_k, int64_t all, int64_t inner, int64_t hidden, int shift, int down_shift, int threads) {
    for (int64_t i = 0; i < tokens * top_k; i++)
        if (ids[i] < 0 || ids[i] >= all) return 2;
    Expert *experts = malloc(tokens * top_k * sizeof *experts);
    Pick *picks = malloc(tokens * top_k * sizeof *picks);
    int failed = !experts || !picks;
    if (!failed) {
        int64_t count = group_picks(gate_up, gate_up_scale, down, down_scale, ids, weights, tokens, top_k, all, inner,
                                    hidden, shift, down_shift, experts, picks);
        failed = swiglu(x, tokens, experts, count, picks, inner, hidden, out, threads);
    }
    free(experts);
    free(picks);
    return failed;
}
