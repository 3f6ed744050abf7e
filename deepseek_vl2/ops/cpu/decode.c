/* Products of one row, and experts and attention of a few, in bfloat16 on a CPU, at the speed at which weights come from memory. See rows.py.

   A vector of weights is read as words of 32 bits, two weights in each: a word's lower half is a weight at an even
   place, its upper half one at an odd place, and either becomes a float by one shift or one mask. The row they are
   multiplied by is split likewise. One row of weights is read after the other: several at a time are slower from
   memory. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* As the registers are: a compiler keeps wider vectors in memory, which takes three times as long. */
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define PAIRS (2 * LANES) /* weights of a vector */
#define ROWS_AT_A_TIME 32
#define MOST_TOKENS 64 /* of experts */
#define COLUMNS 64 /* of values, summed at a time */
#define BYTES_AHEAD 4096 /* a page: the CPU itself fetches ahead within one, and not into the next */

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
/* As they come: at any address. */
typedef float loose_floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t loose_words __attribute__((vector_size(4 * LANES), aligned(2), may_alias));

static inline float widen(uint16_t bits) {
    uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

/* To the nearest, ties to even, as PyTorch rounds. */
static inline uint16_t narrow(float value) {
    uint32_t word;
    memcpy(&word, &value, sizeof word);
    if (value != value) return 0x7fc0;
    return (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

static inline float rounded(float value) { return widen(narrow(value)); }

static inline floats even_of(words pairs) { return (floats)(pairs << 16); }

static inline floats odd_of(words pairs) { return (floats)(pairs & 0xffff0000u); }

static inline float total(floats lanes) {
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += lanes[lane];
    return sum;
}

/* Rows as floats: of each those at even places, then those at odd places. NULL where there is no memory. */
static float *split_rows(const uint16_t *x, int64_t count, int64_t width) {
    int64_t half = (width + 1) / 2;
    float *rows = malloc(count * 2 * half * sizeof(float));
    if (rows)
        for (int64_t r = 0; r < count; r++)
            for (int64_t i = 0; i < width; i++) rows[(2 * r + (i & 1)) * half + i / 2] = widen(x[r * width + i]);
    return rows;
}

static float *split_row(const uint16_t *x, int64_t width) { return split_rows(x, 1, width); }

static inline float dot(const uint16_t *weight, const float *row, int64_t width) {
    const float *even = row, *odd = row + (width + 1) / 2;
    floats evens = {0}, odds = {0};
    int64_t i = 0;
    for (; i + PAIRS <= width; i += PAIRS) {
        __builtin_prefetch((const char *)(weight + i) + BYTES_AHEAD);
        words pairs = *(const loose_words *)(weight + i);
        evens += even_of(pairs) * *(const loose_floats *)(even + i / 2);
        odds += odd_of(pairs) * *(const loose_floats *)(odd + i / 2);
    }
    float sum = total(evens + odds);
    for (; i < width; i++) sum += widen(weight[i]) * (i & 1 ? odd : even)[i / 2];
    return sum;
}

/* out[rows] = weight[rows, width] x[width] + bias[rows]; bias may be NULL. */
int linear(const uint16_t *x, const uint16_t *weight, const uint16_t *bias, uint16_t *out, int64_t rows,
           int64_t width, int threads) {
    float *row = split_row(x, width);
    if (!row) return 1;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; r++)
        out[r] = narrow(dot(weight + r * width, row, width) + (bias ? widen(bias[r]) : 0));
    free(row);
    return 0;
}

/* out[rows] = weight[rows, width] x[width], in float32. */
int logits(const uint16_t *x, const uint16_t *weight, float *out, int64_t rows, int64_t width, int threads) {
    float *row = split_row(x, width);
    if (!row) return 1;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; r++) out[r] = dot(weight + r * width, row, width);
    free(row);
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

/* out[queries + 2 * keys]: queries, keys and values of one row; heads of queries and keys are rotated. */
int queries_keys_values(const uint16_t *x, const uint16_t *query, const uint16_t *key, const uint16_t *value,
                        const uint16_t *cosine, const uint16_t *sine, uint16_t *out, int64_t queries, int64_t keys,
                        int64_t width, int64_t size, int threads) {
    float *row = split_row(x, width);
    if (!row) return 1;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < queries + 2 * keys; r++) {
            const uint16_t *weight = r < queries ? query + r * width
                                     : r < queries + keys ? key + (r - queries) * width
                                                          : value + (r - queries - keys) * width;
            out[r] = narrow(dot(weight, row, width));
        }
#pragma omp for schedule(static)
        for (int64_t first = 0; first < queries + keys; first += size) rotate(out + first, cosine, sine, size);
    }
    free(row);
    return 0;
}

/* out[rows, width]: each row over its root mean square, rounded, times the weight, rounded. */
int rms_norm(const uint16_t *x, const uint16_t *weight, uint16_t *out, int64_t rows, int64_t width, double eps) {
    for (int64_t r = 0; r < rows; r++, x += width, out += width) {
        double squares = 0;
        for (int64_t i = 0; i < width; i++) squares += (double)widen(x[i]) * widen(x[i]);
        float scale = 1 / sqrtf((float)(squares / width) + (float)eps);
        for (int64_t i = 0; i < width; i++) out[i] = narrow(widen(weight[i]) * rounded(widen(x[i]) * scale));
    }
    return 0;
}

/* A SwiGLU MLP: gate and up are [inner, hidden], down is [hidden, inner]; and which picks are its. */
typedef struct {
    const uint16_t *gate, *up, *down;
    int64_t first, end;
} Expert;

/* A token that goes through an expert. */
typedef struct {
    int64_t token;
    float weight;
} Pick;

/* A block of what an expert makes of its tokens, split as rows are: silu(gate x) * up x, every step rounded. Each row of
   weights comes from memory once for all of them. */
static inline void gated_block(const Expert *e, int64_t first, int64_t end, const float *rows, const Pick *picks,
                               float *middle, int64_t inner, int64_t hidden) {
    int64_t half = (inner + 1) / 2, step = (hidden + 1) / 2 * 2;
    for (int64_t r = first; r < end; r++)
        for (int64_t p = e->first; p < e->end; p++)
            middle[(2 * p + (r & 1)) * half + r / 2] = rounded(dot(e->gate + r * hidden, rows + picks[p].token * step, hidden));
    for (int64_t r = first; r < end; r++)
        for (int64_t p = e->first; p < e->end; p++) {
            float up = rounded(dot(e->up + r * hidden, rows + picks[p].token * step, hidden));
            float *at = middle + (2 * p + (r & 1)) * half + r / 2;
            *at = rounded(rounded(*at / (1 + expf(-*at))) * up);
        }
}

/* out[tokens, hidden]: the weighted sum of what each token's experts make of it, in float32, products rounded. */
static int swiglu(const uint16_t *x, int64_t tokens, const Expert *experts, int64_t count, const Pick *picks,
                  uint16_t *out, int64_t inner, int64_t hidden, int threads) {
    int64_t half = (inner + 1) / 2, blocks = (inner + ROWS_AT_A_TIME - 1) / ROWS_AT_A_TIME;
    float *rows = split_rows(x, tokens, hidden), *middle = malloc(experts[count - 1].end * 2 * half * sizeof(float));
    if (!rows || !middle) {
        free(rows);
        free(middle);
        return 1;
    }
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < count * blocks; b++) {
            int64_t first = b % blocks * ROWS_AT_A_TIME, end = first + ROWS_AT_A_TIME < inner ? first + ROWS_AT_A_TIME : inner;
            gated_block(experts + b / blocks, first, end, rows, picks, middle, inner, hidden);
        }
#pragma omp for schedule(static)
        for (int64_t first = 0; first < hidden; first += ROWS_AT_A_TIME) {
            int64_t many = hidden - first < ROWS_AT_A_TIME ? hidden - first : ROWS_AT_A_TIME;
            float sums[MOST_TOKENS][ROWS_AT_A_TIME];
            memset(sums, 0, tokens * sizeof *sums);
            for (const Expert *e = experts; e < experts + count; e++)
                for (int64_t r = 0; r < many; r++)
                    for (int64_t p = e->first; p < e->end; p++) {
                        float down = rounded(dot(e->down + (first + r) * inner, middle + 2 * p * half, inner));
                        sums[picks[p].token][r] += picks[p].weight * down;
                    }
            for (int64_t t = 0; t < tokens; t++)
                for (int64_t r = 0; r < many; r++) out[t * hidden + first + r] = narrow(sums[t][r]);
        }
    }
    free(rows);
    free(middle);
    return 0;
}

/* out[hidden]: a SwiGLU MLP of one row. */
int mlp(const uint16_t *x, const uint16_t *gate, const uint16_t *up, const uint16_t *down, uint16_t *out, int64_t inner,
        int64_t hidden, int threads) {
    Expert one = {gate, up, down, 0, 1};
    Pick pick = {0, 1};
    return swiglu(x, 1, &one, 1, &pick, out, inner, hidden, threads);
}

/* out[tokens, hidden]: the sum over top_k of weights[t, k] times what expert ids[t, k] of `all` makes of row t; matrices
   gate_up [2 inner, hidden] and down [hidden, inner] lie one after the other. Experts are summed in their own order, so
   that a row gets the same alone. Returns 2 where an id is none. */
int experts(const uint16_t *x, const uint16_t *gate_up, const uint16_t *down, const int64_t *ids, const float *weights,
            uint16_t *out, int64_t tokens, int64_t top_k, int64_t all, int64_t inner, int64_t hidden, int threads) {
    int64_t count = 0, chosen = 0, size = inner * hidden;
    for (int64_t i = 0; i < tokens * top_k; i++)
        if (ids[i] < 0 || ids[i] >= all) return 2;
    Expert *found = malloc(tokens * top_k * sizeof *found);
    Pick *picks = malloc(tokens * top_k * sizeof *picks);
    int failed = !found || !picks;
    for (int64_t e = 0; !failed && e < all; e++) {
        int64_t first = chosen;
        for (int64_t i = 0; i < tokens * top_k; i++)
            if (ids[i] == e) picks[chosen++] = (Pick){i / top_k, weights[i]};
        const uint16_t *gate = gate_up + 2 * e * size;
        if (chosen > first) found[count++] = (Expert){gate, gate + size, down + e * size, first, chosen};
    }
    if (!failed) failed = swiglu(x, tokens, found, count, picks, out, inner, hidden, threads);
    free(found);
    free(picks);
    return failed;
}

/* out: the weighted sum of rows that lie step numbers apart, of their first COLUMNS numbers or the few that are left. */
static inline void mix(const uint16_t *rows, const float *weights, uint16_t *out, int64_t length, int64_t step,
                       int64_t left) {
    if (left < COLUMNS) {
        for (int64_t i = 0; i < left; i++) {
            float sum = 0;
            for (int64_t s = 0; s < length; s++) sum += widen(rows[s * step + i]) * weights[s];
            out[i] = narrow(sum);
        }
        return;
    }
    floats evens[COLUMNS / PAIRS] = {0}, odds[COLUMNS / PAIRS] = {0};
    for (int64_t s = 0; s < length; s++)
        for (int part = 0; part < COLUMNS / PAIRS; part++) {
            const uint16_t *numbers = rows + s * step + part * PAIRS;
            __builtin_prefetch((const char *)numbers + BYTES_AHEAD);
            words pairs = *(const loose_words *)numbers;
            evens[part] += even_of(pairs) * weights[s];
            odds[part] += odd_of(pairs) * weights[s];
        }
    for (int64_t i = 0; i < COLUMNS; i++) out[i] = narrow((i & 1 ? odds : evens)[i / PAIRS][i % PAIRS / 2]);
}

/* Turn scores into rounded weights: softmax in float32. */
static void softmax(float *scores, int64_t length) {
    float most = -INFINITY, sum = 0;
    for (int64_t s = 0; s < length; s++)
        if (!(scores[s] <= most)) most = scores[s];
    for (int64_t s = 0; s < length; s++) sum += scores[s] = expf(scores[s] - most);
    for (int64_t s = 0; s < length; s++) scores[s] = rounded(scores[s] / sum);
}

/* out[rows, heads, size]: each head's query attends to lengths[row] keys and values, the first of which is starts[row];
   their heads lie key_step and value_step numbers apart, and their tokens key_row and value_row; heads / kv_heads queries
   share a head of keys. Scores and weights are rounded. */
int attend(const uint16_t *query, const uint16_t *key, const uint16_t *value, const int64_t *starts,
           const int64_t *lengths, uint16_t *out, int64_t rows, int64_t heads, int64_t kv_heads, int64_t size,
           int64_t key_step, int64_t value_step, int64_t key_row, int64_t value_row, double scaling, int threads) {
    int failed = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : failed)
    for (int64_t h = 0; h < rows * heads; h++) {
        int64_t group = h % heads / (heads / kv_heads), start = starts[h / heads], length = lengths[h / heads];
        const uint16_t *keys = key + group * key_step + start * key_row;
        const uint16_t *values = value + group * value_step + start * value_row;
        float *row = split_row(query + h * size, size), *weights = malloc(length * sizeof(float));
        if (row && weights) {
            for (int64_t s = 0; s < length; s++)
                weights[s] = rounded(rounded(dot(keys + s * key_row, row, size)) * (float)scaling);
            softmax(weights, length);
            for (int64_t i = 0; i < size; i += COLUMNS)
                mix(values + i, weights, out + h * size + i, length, value_row, size - i);
        } else {
            failed = 1;
        }
        free(row);
        free(weights);
    }
    return failed;
}

/* out[rows, heads, rank]: each head's query, [rank] and its rotated part [rope], attends to lengths[row] latents [rank]
   and rotated keys [rope] from starts[row] on; tokens lie latent_row and key_row numbers apart. Both products, their sum
   and what scales it are rounded. */
int attend_latents(const uint16_t *query, const uint16_t *rotated, const uint16_t *latent, const uint16_t *key,
                   const int64_t *starts, const int64_t *lengths, uint16_t *out, int64_t rows, int64_t heads,
                   int64_t rank, int64_t rope, int64_t latent_row, int64_t key_row, double scaling, int threads) {
    int failed = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : failed)
    for (int64_t h = 0; h < rows * heads; h++) {
        int64_t start = starts[h / heads], length = lengths[h / heads];
        const uint16_t *latents = latent + start * latent_row, *keys = key + start * key_row;
        float *row = split_row(query + h * rank, rank), *turned = split_row(rotated + h * rope, rope);
        float *weights = malloc(length * sizeof(float));
        if (row && turned && weights) {
            for (int64_t s = 0; s < length; s++) {
                float by_key = rounded(dot(keys + s * key_row, turned, rope));
                weights[s] = rounded(rounded(by_key + rounded(dot(latents + s * latent_row, row, rank))) * (float)scaling);
            }
            softmax(weights, length);
            for (int64_t i = 0; i < rank; i += COLUMNS)
                mix(latents + i, weights, out + h * rank + i, length, latent_row, rank - i);
        } else {
            failed = 1;
        }
        free(row);
        free(turned);
        free(weights);
    }
    return failed;
}
