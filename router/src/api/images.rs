//! Images of a prompt: found in its text, fetched and measured, and put among its ids.

use std::sync::Arc;

use futures::future::try_join_all;
use kvrun_proto::ImageRule;
use sha2::{Digest, Sha256};

use super::App;
use super::error::{ApiError, Kind};
use crate::images::{self, ImageError, Size};
use crate::request::Image;

/// TGI's way to write an image into a text.
const OPEN: &str = "![](";

/// A text with `marker` in the place of each markdown image, and the images' URLs in their order.
pub fn from_markdown(text: &str, marker: &str) -> (String, Vec<String>) {
    let (mut plain, mut urls, mut rest) = (String::new(), Vec::new(), text);
    while let Some((before, after)) = rest.split_once(OPEN)
        && let Some((url, behind)) = after.split_once(')')
    {
        plain.push_str(before);
        plain.push_str(marker);
        urls.push(url.to_owned());
        rest = behind;
    }
    plain.push_str(rest);
    (plain, urls)
}

/// Ids with those of images among them.
#[derive(Debug, PartialEq)]
pub struct Placed {
    /// All ids.
    pub ids: Vec<u32>,
    /// Where each image's begin, and how many they are.
    pub spans: Vec<(u32, u32)>,
}

/// What was read of an image.
pub struct Loaded {
    data: Arc<[u8]>,
    digest: [u8; 32],
    size: Size,
}

/// Reads images: `data:` URLs, and where that is allowed others. All together, or the first error.
pub async fn load(app: &App, urls: &[String], field: &str) -> Result<Vec<Loaded>, ApiError> {
    let told = |error: ImageError| told(error, field);
    if urls.len() > images::MOST {
        return Err(told(ImageError::TooMany(urls.len())));
    }
    let files = try_join_all(urls.iter().map(|url| app.fetcher.get(url)));
    let files = files.await.map_err(told)?;
    if files.iter().map(Vec::len).sum::<usize>() > images::TOTAL_BYTES {
        return Err(told(ImageError::TooLargeTogether));
    }
    // Hashing megabytes would hold up every stream of this thread.
    let read = tokio::task::spawn_blocking(|| files.into_iter().map(read).collect());
    let read: Result<Vec<Loaded>, ImageError> = read
        .await
        .map_err(|_| ApiError::new(Kind::Incomplete, "reading the images broke off"))?;
    read.map_err(told)
}

fn read(file: Vec<u8>) -> Result<Loaded, ImageError> {
    let size = images::measure(&file)?;
    Ok(Loaded {
        digest: Sha256::digest(&file).into(),
        data: file.into(),
        size,
    })
}

/// Puts images in the places of their marker, the first image in the first one.
pub fn place(
    app: &App,
    rule: &ImageRule,
    ids: &[u32],
    loaded: Vec<Loaded>,
    field: &str,
) -> Result<(Vec<u32>, Vec<Image>), ApiError> {
    let Some(marker) = app.text.tokenizer().id_of(&rule.marker) else {
        tracing::error!(rule.marker, "the tokenizer has no token for images");
        let message = "this model's tokenizer has no token that stands for an image; send a text without images";
        return Err(ApiError::field(field, message));
    };
    let becomes = loaded.iter().map(|image| images::ids(rule, image.size));
    let becomes: Vec<Vec<u32>> = becomes
        .collect::<Result<_, _>>()
        .map_err(|error| told(error, field))?;
    let placed = expand(ids, marker, rule.token, &becomes).map_err(|places| {
        let (sent, marker) = (becomes.len(), &rule.marker);
        let message = format!(
            "`{field}` has {sent} images and {places} places for one (`{marker}`); write it for images only, once for each"
        );
        ApiError::field(field, message)
    })?;
    let image = |(image, (at, tokens)): (Loaded, (u32, u32))| Image {
        data: image.data,
        digest: image.digest,
        at,
        tokens,
    };
    let placed_images = loaded.into_iter().zip(placed.spans).map(image).collect();
    Ok((placed.ids, placed_images))
}

/// Replaces each `marker` by what the next image becomes. The error is the number of places, where it is another than
/// that of the images; an id that `stands` for a part of an image is a place as well.
fn expand(ids: &[u32], marker: u32, stands: u32, becomes: &[Vec<u32>]) -> Result<Placed, usize> {
    let is_place = |id: u32| id == marker || id == stands;
    let places = ids.iter().filter(|&&id| is_place(id)).count();
    let markers = ids.iter().filter(|&&id| id == marker).count();
    if (places, markers) != (becomes.len(), becomes.len()) {
        return Err(places);
    }
    let mut placed = Placed {
        ids: Vec::new(),
        spans: Vec::new(),
    };
    let mut next = becomes.iter();
    for &id in ids {
        match next.as_slice().first().filter(|_| id == marker) {
            Some(image) => {
                placed
                    .spans
                    .push((placed.ids.len() as u32, image.len() as u32));
                placed.ids.extend(image);
                next.next();
            }
            None => placed.ids.push(id),
        }
    }
    Ok(placed)
}

fn told(error: ImageError, field: &str) -> ApiError {
    let message = format!("`{field}`: {error}");
    match error {
        ImageError::Busy => {
            ApiError::new(Kind::Overloaded, message).after(std::time::Duration::from_secs(1))
        }
        _ => ApiError::field(field, message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markdown_images_leave_a_marker_behind() {
        let (text, urls) = from_markdown("a ![](data:x) b![](http://y/z)", "<i>");
        assert_eq!(text, "a <i> b<i>");
        assert_eq!(urls, ["data:x", "http://y/z"]);
        for plain in ["![alt](x)", "[](x)", "![](x", "!"] {
            assert_eq!(from_markdown(plain, "<i>"), (plain.to_owned(), vec![]));
        }
    }

    #[test]
    fn every_marker_becomes_the_ids_of_its_image() {
        let images = [vec![7, 8, 8], vec![8]];
        let placed = expand(&[1, 5, 2, 5, 3], 5, 8, &images).unwrap();
        assert_eq!(placed.ids, [1, 7, 8, 8, 2, 8, 3]);
        assert_eq!(placed.spans, [(1, 3), (5, 1)]);
        assert_eq!(
            expand(&[1, 5], 5, 5, &images[..1]).unwrap().ids,
            [1, 7, 8, 8]
        );
        assert_eq!(expand(&[1, 2], 5, 8, &[]).unwrap().ids, [1, 2]);
    }

    #[test]
    fn markers_and_images_must_be_equally_many() {
        let image = vec![8, 8];
        assert_eq!(
            expand(&[1, 5, 5], 5, 8, std::slice::from_ref(&image)),
            Err(2)
        );
        assert_eq!(expand(&[1], 5, 8, std::slice::from_ref(&image)), Err(0));
        assert_eq!(expand(&[5], 5, 8, &[]), Err(1));
        assert_eq!(expand(&[8], 5, 8, &[]), Err(1));
        assert_eq!(expand(&[8], 5, 8, &[image]), Err(1));
    }
}
