//! What an image's header says of its size.

use imagesize::{ImageType, blob_size, image_type};

use super::{ImageError, PIXELS};

/// Pixels down and across.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Pixels down.
    pub height: u32,
    /// Pixels across.
    pub width: u32,
}

/// The size of an image, judged by its bytes alone.
pub fn measure(data: &[u8]) -> Result<Size, ImageError> {
    // A reader of headers that trips over bytes which somebody made for that must not take the request's task along.
    let found = std::panic::catch_unwind(|| {
        let taken = [
            ImageType::Png,
            ImageType::Jpeg,
            ImageType::Webp,
            ImageType::Gif,
        ];
        let kind = image_type(data).ok().filter(|kind| taken.contains(kind));
        kind.and_then(|_| blob_size(data).ok())
    });
    let size = found.ok().flatten().ok_or(ImageError::Unreadable)?;
    let (width, height) = (size.width as u64, size.height as u64);
    if width.saturating_mul(height) > PIXELS {
        return Err(ImageError::TooManyPixels { width, height });
    }
    match (u32::try_from(height), u32::try_from(width)) {
        (Ok(height), Ok(width)) if height > 0 && width > 0 => Ok(Size { height, width }),
        _ => Err(ImageError::Unreadable),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gif(width: u16, height: u16) -> Vec<u8> {
        [
            b"GIF89a".as_slice(),
            &width.to_le_bytes(),
            &height.to_le_bytes(),
            &[0; 16],
        ]
        .concat()
    }

    fn png(width: u32, height: u32) -> Vec<u8> {
        let head = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR".as_slice();
        [
            head,
            &width.to_be_bytes(),
            &height.to_be_bytes(),
            &[8, 2, 0, 0, 0],
        ]
        .concat()
    }

    #[test]
    fn headers_tell_the_size() {
        let size = |height, width| Ok(Size { height, width });
        assert_eq!(measure(&gif(70, 40)), size(40, 70));
        assert_eq!(measure(&png(70, 40)), size(40, 70));
    }

    #[test]
    fn bombs_and_other_files_are_refused() {
        let bomb = ImageError::TooManyPixels {
            width: 100_000,
            height: 100_000,
        };
        assert_eq!(measure(&png(100_000, 100_000)), Err(bomb));
        assert!(measure(&png(u32::MAX, u32::MAX)).is_err());
        let bmp = [b"BM".as_slice(), &[40; 60]].concat();
        for data in [
            png(0, 4),
            gif(4, 0),
            bmp,
            b"<svg/>".to_vec(),
            vec![],
            png(1, 1)[..20].to_vec(),
        ] {
            assert_eq!(measure(&data), Err(ImageError::Unreadable), "{data:?}");
        }
    }
}
