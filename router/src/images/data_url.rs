//! `data:` URLs.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::ImageError;

/// Whether a URL holds its data itself.
pub fn is_data_url(url: &str) -> bool {
    url.get(..5)
        .is_some_and(|scheme| scheme.eq_ignore_ascii_case("data:"))
}

/// The bytes of a `data:` URL in base64, at most `most`. What it says of their type is not believed.
pub fn decode(url: &str, most: usize) -> Result<Vec<u8>, ImageError> {
    let (head, data) = url.split_once(',').ok_or(ImageError::BadData)?;
    let is_base64 = head
        .rsplit(';')
        .next()
        .is_some_and(|last| last.eq_ignore_ascii_case("base64"));
    if !is_base64 {
        return Err(ImageError::BadData);
    }
    let data = data.trim();
    if data.len() / 4 * 3 > most.saturating_add(2) {
        return Err(ImageError::TooLarge(most));
    }
    let bytes = STANDARD.decode(data).map_err(|_| ImageError::BadData)?;
    match bytes.len() > most {
        true => Err(ImageError::TooLarge(most)),
        false => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_of_bounded_size_is_read() {
        assert_eq!(decode("data:image/png;base64,AAEC", 3), Ok(vec![0, 1, 2]));
        assert_eq!(decode("DATA:;charset=x;BASE64,AAEC", 3), Ok(vec![0, 1, 2]));
        assert_eq!(
            decode("data:image/png;base64,AAECAw==", 3),
            Err(ImageError::TooLarge(3))
        );
        assert_eq!(
            decode("data:image/png;base64,AAECAAECAAEC", 3),
            Err(ImageError::TooLarge(3))
        );
        for url in [
            "data:image/png,AAEC",
            "data:image/png;base64",
            "data:image/png;base64,A",
            "data:;base64,é===",
        ] {
            assert_eq!(decode(url, 3), Err(ImageError::BadData), "{url}");
        }
    }
}
