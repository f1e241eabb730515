// Where rays enter and leave the occupied cells of scene boxes (occupancy.py).
#include <algorithm>
#include <cstdint>

namespace {

// Index of a cell along one side. The comparisons also catch NaN.
inline int64_t cell(float place, float half, float most) {
  const float x = (place + 1.0f) * half;
  return static_cast<int64_t>(x > 0.0f ? std::min(x, most) : 0.0f);
}

}  // namespace

// cells: (scenes x side³); rays: (scenes x rays). A ray that meets no cell ends where it begins.
extern "C" void latentscenes_bound_rays(int64_t scenes, int64_t rays, int64_t side, int64_t steps, int64_t threads,
                                        const uint8_t* cells, const float* origins, const float* directions,
                                        const float* near, const float* far, float* first, float* last) {
  const float half = 0.5f * static_cast<float>(side), most = static_cast<float>(side - 1);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t ray = 0; ray < scenes * rays; ++ray) {
    const float *origin = origins + 3 * ray, *direction = directions + 3 * ray;
    const uint8_t* scene = cells + ray / rays * side * side * side;
    const float width = (far[ray] - near[ray]) / static_cast<float>(steps);
    auto occupied = [&](int64_t step) {
      const float t = near[ray] + (static_cast<float>(step) + 0.5f) * width;
      const int64_t x = cell(origin[0] + t * direction[0], half, most);
      const int64_t y = cell(origin[1] + t * direction[1], half, most);
      return scene[(x * side + y) * side + cell(origin[2] + t * direction[2], half, most)] > 0;
    };
    first[ray] = last[ray] = near[ray];
    if (!(width > 0)) continue;
    int64_t from = 0, to = steps - 1;
    while (from < steps && !occupied(from)) ++from;
    if (from == steps) continue;
    while (!occupied(to)) --to;
    first[ray] = near[ray] + static_cast<float>(from) * width;
    last[ray] = near[ray] + static_cast<float>(to + 1) * width;
  }
}
