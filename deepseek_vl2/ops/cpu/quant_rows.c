/* Products of one row with packed weights of 4 and 8 bits on a CPU. See quant_rows.py.

   The row is quantized to int8 with a scale for 32 columns, so that products are of integers (vpdpbusd, or vpmaddubsw
   where there is none): a word of 32 bits holds eight weights of 4 bits or four of 8, and becomes one lane of 32 bits,
   which is then scaled in float32. For 4 bits the row is split into its even and its odd columns, as the lower and the
   upper halves of the bytes are. Both kinds of weights are multiplied as unsigned numbers, 8 or 128 too large; what
   that adds is known from the row alone, and lanes begin at its negative. */

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
#define ROWS_AT_A_TIME 32
#define BYTES_AHEAD 4096

enum { INT4 = 4, INT8 = 8 };

static inline float widen(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

static inline uint16_t narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)((bits >> 16) | 0x40); /* NaN */
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float rounded(float value) { return widen(narrow(value)); }

/* A quantized row. For 4 bits `numbers` holds the even columns and `odd` the odd ones. */
typedef struct {
    int8_t *numbers, *odd;
    int32_t *start; /* of each lane: minus what the offset of the weights adds */
    float *scale;   /* of each lane */
} Row;

static inline int64_t padded_words(int64_t width, int bits) {
    int64_t words = (width * bits + 31) / 32;
    return (words + WORDS - 1) / WORDS * WORDS;
}

static size_t row_bytes(int64_t width, int bits) { return padded_words(width, bits) * (bits == INT4 ? 16 : 12) + 64; }

static Row place_row(char *memory, int64_t width, int bits) {
    int64_t words = padded_words(width, bits);
    Row row = {.scale = (float *)memory, .start = (int32_t *)memory + words, .numbers = (int8_t *)memory + 8 * words};
    row.odd = row.numbers + 4 * words;
    return row;
}

static void quantize_row(const float *x, int64_t width, int bits, Row row) {
    int per_word = 32 / bits, offset = bits == INT4 ? 8 : 128; /* of signed products, AVX2's of 8 bits, it goes unused */
    int64_t words = padded_words(width, bits);
    memset(row.scale, 0, words * (bits == INT4 ? 16 : 12));
    for (int64_t first = 0; first < width; first += BLOCK) {
        int64_t end = first + BLOCK < width ? first + BLOCK : width;
        float most = 0;
        for (int64_t i = first; i < end; i++) {
            float size = fabsf(x[i]);
            if (!(size <= most)) most = size; /* a NaN stays */
        }
        float scale = most / 127, inverse = most > 0 ? 127 / most : 0;
        for (int64_t i = first; i < end; i++) {
            int32_t number = isfinite(scale) ? (int32_t)rintf(x[i] * inverse) : 0;
            int64_t word = i / per_word;
            row.start[word] -= offset * number;
            row.scale[word] = scale;
            if (bits == INT4)
                (i & 1 ? row.odd : row.numbers)[i / 2] = (int8_t)number;
            else
                row.numbers[i] = (int8_t)number;
        }
    }
}

#if WORDS == 16
typedef __m512 floats;
typedef __m512i integers;
static inline integers load_words(const uint32_t *at, int64_t left) {
    return left >= WORDS ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi32((__mmask16)((1u << left) - 1), at);
}
static inline integers load_lanes(const void *at) { return _mm512_loadu_si512(at); }
static inline integers products_of_4(integers words, Row row, int64_t word) {
    const integers low = _mm512_set1_epi8(15);
    integers sum = load_lanes(row.start + word);
    sum = _mm512_dpbusd_epi32(sum, _mm512_and_si512(words, low), load_lanes(row.numbers + 4 * word));
    return _mm512_dpbusd_epi32(sum, _mm512_and_si512(_mm512_srli_epi16(words, 4), low), load_lanes(row.odd + 4 * word));
}
static inline integers products_of_8(integers words, Row row, int64_t word) {
    integers bytes = _mm512_xor_si512(words, _mm512_set1_epi8((char)128));
    return _mm512_dpbusd_epi32(load_lanes(row.start + word), bytes, load_lanes(row.numbers + 4 * word));
}
/* One scale for 2^shift words each. */
static inline floats spread(const uint16_t *scales, int shift, int64_t left) {
    int64_t count = ((left < WORDS ? left : WORDS) + (1 << shift) - 1) >> shift;
    __m128i few = _mm_maskz_loadu_epi16((__mmask8)((1u << count) - 1), scales);
    integers wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_castsi128_si256(few)), 16);
    integers lanes = _mm512_srl_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                      _mm_cvtsi32_si128(shift));
    return _mm512_permutexvar_ps(lanes, _mm512_castsi512_ps(wide));
}
#define AS_FLOATS(numbers) _mm512_cvtepi32_ps(numbers)
#define TIMES(a, b) _mm512_mul_ps(a, b)
#define ADD_PRODUCT(a, b, sum) _mm512_fmadd_ps(a, b, sum)
#define LOAD_FLOATS(at) _mm512_loadu_ps(at)
#define ONE_FOR_ALL(value) _mm512_set1_ps(value)
#define ZERO _mm512_setzero_ps()
#define TOTAL(lanes) _mm512_reduce_add_ps(lanes)
#else
typedef __m256 floats;
typedef __m256i integers;
static inline integers load_lanes(const void *at) { return _mm256_loadu_si256((const __m256i *)at); }
static inline integers load_words(const uint32_t *at, int64_t left) {
    if (left >= WORDS) return load_lanes(at);
    uint32_t words[WORDS] = {0};
    memcpy(words, at, 4 * left);
    return load_lanes(words);
}
static inline integers add_pairs(integers sum, integers pairs) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
static inline integers products_of_4(integers words, Row row, int64_t word) {
    const integers low = _mm256_set1_epi8(15);
    integers even = _mm256_maddubs_epi16(_mm256_and_si256(words, low), load_lanes(row.numbers + 4 * word));
    integers halves = _mm256_and_si256(_mm256_srli_epi16(words, 4), low);
    integers odd = _mm256_maddubs_epi16(halves, load_lanes(row.odd + 4 * word));
    return add_pairs(load_lanes(row.start + word), _mm256_add_epi16(even, odd));
}
static inline integers products_of_8(integers words, Row row, int64_t word) {
    /* Sizes of the weights times the row with their signs: unsigned as they are, pairs would overflow 16 bits. */
    integers signed_row = _mm256_sign_epi8(load_lanes(row.numbers + 4 * word), words);
    return add_pairs(_mm256_setzero_si256(), _mm256_maddubs_epi16(_mm256_abs_epi8(words), signed_row));
}
static inline floats spread(const uint16_t *scales, int shift, int64_t left) {
    float lanes[WORDS];
    for (int lane = 0; lane < WORDS; lane++) lanes[lane] = lane < left ? widen(scales[lane >> shift]) : 0;
    return _mm256_loadu_ps(lanes);
}
static inline float total_of(floats lanes) {
    float all[WORDS], sum = 0;
    _mm256_storeu_ps(all, lanes);
    for (int lane = 0; lane < WORDS; lane++) sum += all[lane];
    return sum;
}
#define AS_FLOATS(numbers) _mm256_cvtepi32_ps(numbers)
#define TIMES(a, b) _mm256_mul_ps(a, b)
#define ADD_PRODUCT(a, b, sum) _mm256_fmadd_ps(a, b, sum)
#define LOAD_FLOATS(at) _mm256_loadu_ps(at)
#define ONE_FOR_ALL(value) _mm256_set1_ps(value)
#define ZERO _mm256_setzero_ps()
#define TOTAL(lanes) total_of(lanes)
#endif

/* One row of 4-bit weights times the quantized row; a scale for 8 << shift columns. */
static inline float dot_4(const uint32_t *weight, const uint16_t *scales, int shift, Row row, int64_t words) {
    floats sum = ZERO;
    for (int64_t word = 0; word < words; word += WORDS) {
        __builtin_prefetch((const char *)(weight + word) + BYTES_AHEAD);
        integers numbers = products_of_4(load_words(weight + word, words - word), row, word);
        floats scale = (1 << shift) >= WORDS ? ONE_FOR_ALL(widen(scales[word >> shift]))
                                             : spread(scales + (word >> shift), shift, words - word);
        sum = ADD_PRODUCT(TIMES(AS_FLOATS(numbers), LOAD_FLOATS(row.scale + word)), scale, sum);
    }
    return TOTAL(sum);
}

/* One row of 8-bit weights, width of them, times the quantized row. */
static inline float dot_8(const int8_t *weight, uint16_t scale, Row row, int64_t width) {
    floats sum = ZERO;
    int64_t words = width / 4;
    for (int64_t word = 0; word < words; word += WORDS) {
        __builtin_prefetch(weight + 4 * word + BYTES_AHEAD);
        integers numbers = products_of_8(load_words((const uint32_t *)weight + word, words - word), row, word);
        sum = ADD_PRODUCT(AS_FLOATS(numbers), LOAD_FLOATS(row.scale + word), sum);
    }
    return TOTAL(sum) * widen(scale);
}

/* A packed matrix of `width` columns. */
typedef struct {
    const void *weight;
    const uint16_t *scale;
    int64_t width;
    int bits, shift; /* shift: log2 of the words that share a scale, of 4 bits alone */
} Matrix;

static inline float dot(Matrix m, int64_t r, Row row) {
    if (m.bits == INT8) return dot_8((const int8_t *)m.weight + r * m.width, m.scale[r], row, m.width);
    int64_t words = m.width / 8;
    return dot_4((const uint32_t *)m.weight + r * words, m.scale + r * (words >> m.shift), m.shift, row, words);
}

static float *floats_of(const uint16_t *x, int64_t width) {
    float *out = malloc(width * sizeof(float) + 1);
    if (out)
        for (int64_t i = 0; i < width; i++) out[i] = widen(x[i]);
    return out;
}

/* out[rows] = weight[rows, width] x[width] + bias[rows]; bias may be NULL. */
int packed_linear(const uint16_t *x, const void *weight, const uint16_t *scale, const uint16_t *bias, uint16_t *out,
                  int64_t rows, int64_t width, int bits, int shift, int threads) {
    float *plain = floats_of(x, width);
    char *memory = malloc(row_bytes(width, bits));
    int failed = !plain || !memory;
    if (!failed) {
        Row row = place_row(memory, width, bits);
        quantize_row(plain, width, bits, row);
        Matrix m = {weight, scale, width, bits, shift};
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t r = 0; r < rows; r++) out[r] = narrow(dot(m, r, row) + (bias ? widen(bias[r]) : 0));
    }
    free(plain);
    free(memory);
    return failed;
}

/* out[hidden] = sum over count of weights[e] downs[e] (silu(gates[e] x) * ups[e] x), the experts ids[e] of matrices
   gate_up [2 inner, hidden] and down [hidden, inner] that lie one after the other; products are rounded, and summed in
   float32. */
int packed_experts(const uint16_t *x, const char *gate_up, const uint16_t *gate_up_scale, const char *down,
                   const uint16_t *down_scale, const int64_t *ids, const float *weights, uint16_t *out, int64_t count,
                   int64_t inner, int64_t hidden, int up_bits, int up_shift, int down_bits, int down_shift,
                   int threads) {
    int64_t up_scales = up_bits == INT8 ? 1 : (hidden / 8) >> up_shift;
    int64_t down_scales = down_bits == INT8 ? 1 : (inner / 8) >> down_shift;
    size_t one = (row_bytes(inner, down_bits) + 63) / 64 * 64;
    float *plain = floats_of(x, hidden), *middle = malloc(count * inner * sizeof(float) + 1);
    char *memory = malloc(row_bytes(hidden, up_bits)), *middles = malloc(count * one + 1);
    int failed = !plain || !middle || !memory || !middles;
    if (!failed) {
        Row row = place_row(memory, hidden, up_bits);
        quantize_row(plain, hidden, up_bits, row);
        int64_t blocks = (inner + ROWS_AT_A_TIME - 1) / ROWS_AT_A_TIME;
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (int64_t b = 0; b < count * blocks; b++) {
                int64_t e = b / blocks, first = b % blocks * ROWS_AT_A_TIME;
                int64_t end = first + ROWS_AT_A_TIME < inner ? first + ROWS_AT_A_TIME : inner;
                Matrix m = {gate_up + ids[e] * 2 * inner * hidden * up_bits / 8,
                            gate_up_scale + ids[e] * 2 * inner * up_scales, hidden, up_bits, up_shift};
                float gate[ROWS_AT_A_TIME];
                for (int64_t r = first; r < end; r++) gate[r - first] = rounded(dot(m, r, row));
                for (int64_t r = first; r < end; r++) {
                    float up = rounded(dot(m, inner + r, row)), g = gate[r - first];
                    middle[e * inner + r] = rounded(rounded(g / (1 + expf(-g))) * up);
                }
            }
#pragma omp for schedule(static)
            for (int64_t e = 0; e < count; e++)
                quantize_row(middle + e * inner, inner, down_bits, place_row(middles + e * one, inner, down_bits));
#pragma omp for schedule(static)
            for (int64_t first = 0; first < hidden; first += ROWS_AT_A_TIME) {
                int64_t end = first + ROWS_AT_A_TIME < hidden ? first + ROWS_AT_A_TIME : hidden;
                float sums[ROWS_AT_A_TIME] = {0};
                for (int64_t e = 0; e < count; e++) {
                    Row part = place_row(middles + e * one, inner, down_bits);
                    Matrix m = {down + ids[e] * hidden * inner * down_bits / 8,
                                down_scale + ids[e] * hidden * down_scales, inner, down_bits, down_shift};
                    for (int64_t r = first; r < end; r++) sums[r - first] += weights[e] * rounded(dot(m, r, part));
                }
                for (int64_t r = first; r < end; r++) out[r] = narrow(sums[r - first]);
            }
        }
    }
    free(plain);
    free(middle);
    free(memory);
    free(middles);
    return failed;
}
