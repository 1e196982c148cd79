//! How many ids an image becomes, by the rule that the shards describe.

use kvrun_proto::image_rule::Layout;
use kvrun_proto::{ImageRule, ImageSize, PannedImage, TiledImage};

use super::{ImageError, Size};

/// Ids that each picture of an image of this size becomes.
pub fn features(rule: &ImageRule, size: Size) -> Result<usize, ImageError> {
    let features = match &rule.layout {
        Some(Layout::Fixed(fixed)) => fixed.features,
        Some(Layout::Tiled(tiled)) => tiles(tiled, size).unwrap_or(0),
        Some(Layout::Panned(panned)) => panned.features,
        None => 0,
    };
    match features {
        0 => Err(ImageError::Uncounted),
        features => Ok(features as usize),
    }
}

/// Crops that an image is cut into along its longer edge; none of an image that is near to square, or small.
pub fn crops(panned: &PannedImage, size: Size) -> u32 {
    let (longer, shorter) = (size.height.max(size.width), size.height.min(size.width));
    let ratio = f64::from(longer) / f64::from(shorter);
    let rounded = (ratio + 0.5).floor() as u32;
    let wanted = rounded.min(longer / panned.shortest.max(1)).max(2);
    let side = longer.div_ceil(wanted.min(panned.most).max(1));
    if ratio < panned.ratio || side.min(shorter) < panned.shortest {
        return 0;
    }
    longer.div_ceil(side)
}

/// One tile of the whole image, then its best grid: rows of what is no padding, each with one id more at its end.
fn tiles(tiled: &TiledImage, size: Size) -> Option<u32> {
    let grid = best_grid(&tiled.grids, size)?;
    let side = |pixels: u32| Some(pixels.checked_div(tiled.tile_pixels)? * tiled.tile_tokens);
    let (mut rows, mut columns) = (side(grid.height)?, side(grid.width)?);
    let (height, width) = (f64::from(size.height), f64::from(size.width));
    let (down, across) = (f64::from(rows), f64::from(columns));
    if width / height > across / down {
        rows -= (rows - rounded(height * (across / width))) / 2 * 2;
    } else {
        columns -= (columns - rounded(width * (down / height))) / 2 * 2;
    }
    Some(tiled.tile_tokens * tiled.tile_tokens + rows * columns + rows)
}

/// The grid that keeps most of an image's pixels, of several such the one that wastes least, of several such the first.
fn best_grid(grids: &[ImageSize], size: Size) -> Option<&ImageSize> {
    let (height, width) = (f64::from(size.height), f64::from(size.width));
    let all = u64::from(size.height) * u64::from(size.width);
    let worth = |grid: &ImageSize| {
        let scale = (f64::from(grid.width) / width).min(f64::from(grid.height) / height);
        let kept = ((width * scale) as u64 * (height * scale) as u64).min(all);
        let wasted = u64::from(grid.height) * u64::from(grid.width) - kept;
        (kept, std::cmp::Reverse(wasted))
    };
    // The last of equals wins `max_by_key`.
    grids.iter().rev().max_by_key(|grid| worth(grid))
}

/// Rounded to seven digits and cut, as the models were trained.
fn rounded(value: f64) -> u32 {
    let digits = format!("{value:.7}");
    digits
        .split('.')
        .next()
        .and_then(|whole| whole.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Heights, widths and what the reference makes of them.
    fn counted(file: &str) -> Vec<(u32, u32, usize)> {
        serde_json::from_str(file).unwrap()
    }

    /// (height, width, ids on 336-pixel tiles of 24 x 24, ids on 28-pixel tiles of 2 x 2), from the reference processor.
    const COUNTED: [(u32, u32, usize, usize); 16] = [
        (40, 70, 1608, 14),
        (336, 336, 1176, 24),
        (1, 1, 1176, 10),
        (480, 640, 2340, 24),
        (640, 480, 2352, 24),
        (3000, 4000, 2340, 24),
        (1000, 17, 792, 6),
        (17, 1000, 722, 4),
        (671, 673, 2928, 24),
        (1080, 1920, 1948, 14),
        (1, 5000, 576, 4),
        (5000, 1, 600, 6),
        (333, 777, 1944, 14),
        (1200, 1200, 2928, 24),
        (500, 1499, 2328, 14),
        (97, 31, 792, 16),
    ];

    fn rule(tile_pixels: u32, tile_tokens: u32, grids: &[(u32, u32)]) -> ImageRule {
        let grid = |&(height, width): &(u32, u32)| ImageSize { height, width };
        ImageRule {
            token: 9,
            layout: Some(Layout::Tiled(TiledImage {
                tile_pixels,
                tile_tokens,
                grids: grids.iter().map(grid).collect(),
            })),
            ..Default::default()
        }
    }

    #[test]
    fn tiles_are_counted_as_the_reference_counts_them() {
        let grids = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)];
        let (large, small) = (
            rule(336, 24, &grids),
            rule(28, 2, &[(28, 56), (56, 28), (56, 56)]),
        );
        for (height, width, on_large, on_small) in COUNTED {
            let size = Size { height, width };
            let count = |rule| features(rule, size).unwrap();
            assert_eq!(
                (count(&large), count(&small)),
                (on_large, on_small),
                "{size:?}"
            );
        }
        for (height, width, expected) in counted(include_str!("../../tests/data/anyres.json")) {
            let size = Size { height, width };
            assert_eq!(features(&large, size).unwrap(), expected, "{size:?}");
        }
    }

    #[test]
    fn crops_are_counted_as_the_reference_counts_them() {
        let panned = PannedImage {
            shortest: 256,
            most: 4,
            ratio: 1.2,
            ..Default::default()
        };
        for (height, width, expected) in counted(include_str!("../../tests/data/panned.json")) {
            let size = Size { height, width };
            assert_eq!(crops(&panned, size) as usize, expected, "{size:?}");
        }
    }

    #[test]
    fn a_rule_that_counts_nothing_is_an_error() {
        let size = Size {
            height: 3,
            width: 3,
        };
        for rule in [
            ImageRule::default(),
            rule(0, 24, &[(336, 336)]),
            rule(336, 24, &[]),
        ] {
            assert_eq!(features(&rule, size), Err(ImageError::Uncounted));
        }
    }
}
