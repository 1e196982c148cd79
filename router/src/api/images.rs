//! Images of a prompt: found in its text, fetched and measured, and put in their places.

use std::sync::Arc;

use futures::future::try_join_all;
use kvrun_proto::ImageRule;
use sha2::{Digest, Sha256};

use super::App;
use super::error::{ApiError, Kind};
use crate::images::{self, ImageError, Size, Written};
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

/// A prompt's text with its images in their places, not yet tokenized.
pub struct Shown<'a> {
    rule: &'a ImageRule,
    written: Written,
    loaded: Vec<Loaded>,
    field: &'static str,
}

impl<'a> Shown<'a> {
    /// Puts images in the places of their marker, the first image in the first one.
    pub fn new(
        app: &App,
        rule: &'a ImageRule,
        text: &str,
        loaded: Vec<Loaded>,
        field: &'static str,
    ) -> Result<Self, ApiError> {
        let placeholder = app.text.tokenizer().token_text(rule.token);
        if placeholder.is_empty() {
            tracing::error!(rule.token, "the tokenizer has no token for images");
            let message = "this model's tokenizer has no token that stands for an image; serve it with the tokenizer that it came with";
            return Err(ApiError::field(field, message));
        }
        let sizes: Vec<Size> = loaded.iter().map(|image| image.size).collect();
        let written = images::write(rule, &placeholder, text, &sizes);
        Ok(Self {
            rule,
            written: written.map_err(|error| told(error, field))?,
            loaded,
            field,
        })
    }

    /// What is to be tokenized.
    pub fn text(&self) -> &str {
        &self.written.text
    }

    /// The ids of the text with those of the images among them.
    pub fn place(self, ids: &[u32]) -> Result<(Vec<u32>, Vec<Image>), ApiError> {
        let placed = self.written.place(self.rule, ids);
        let placed = placed.map_err(|error| told(error, self.field))?;
        let image = |(image, (at, tokens)): (Loaded, (u32, u32))| Image {
            data: image.data,
            digest: image.digest,
            at,
            tokens,
        };
        let images = self.loaded.into_iter().zip(placed.spans).map(image);
        Ok((placed.ids, images.collect()))
    }
}

/// Refuses a prompt of ids that stand for images, which come with texts only.
pub fn refuse_places(
    app: &App,
    rule: &ImageRule,
    ids: &[u32],
    field: &str,
) -> Result<(), ApiError> {
    let marker = app.text.tokenizer().id_of(&rule.marker);
    images::refuse_places(rule, marker, ids).map_err(|error| told(error, field))
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
}
