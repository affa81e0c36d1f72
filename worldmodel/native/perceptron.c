/* Linear maps with a SiLU between each two, over a few rows in one call. */
#include "linear.h"

#include <stdlib.h>

/* x (B, first inputs) to y (B, last outputs). */
typedef struct {
    const Linear *map;
    const float *x;
    float *y;
    int32_t maps, rows;
} Perceptron;

int worldmodel_perceptron(const Perceptron *p)
{
    int widest = 0;
    for (int i = 0; i < p->maps; i++) widest = padded(p->map[i].outputs) > widest ? padded(p->map[i].outputs) : widest;
    if (p->rows < 1) return 0;
    float *memory = aligned_alloc(64, 2 * sizeof(float) * widest * p->rows);
    if (!memory) return 1;
    float *into = memory, *other = memory + (ptrdiff_t)widest * p->rows;
    const float *from = p->x;
    Tiles before;
    tiles_begin(&before);
    ptrdiff_t ld = p->map->inputs;
    for (int i = 0; i < p->maps; i++) {
        linear(p->map + i, p->rows, from, ld, into, widest, i < p->maps - 1 ? SILU : PLAIN);
        from = into, into = other, other = (float *)from, ld = widest;
    }
    tiles_end(&before);
    const int outputs = p->map[p->maps - 1].outputs;
    for (int row = 0; row < p->rows; row++)
        for (int j = 0; j < outputs; j++) p->y[row * outputs + j] = from[row * (ptrdiff_t)widest + j];
    free(memory);
    return 0;
}
