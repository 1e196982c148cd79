//! Images that come with requests: where their bytes come from, how large they say they are, and how many ids they become.
//! Nothing here decodes a pixel.

mod address;
mod count;
mod data_url;
mod fetch;
mod measure;
mod write;

pub use data_url::is_data_url;
pub use fetch::Fetcher;
pub use measure::{Size, measure};
pub use write::{Written, refuse_places, write};

use std::net::IpAddr;

/// Most images of one request.
pub const MOST: usize = 16;
/// Most bytes of all images of one request; an admission has to fit one message to the shards.
pub const TOTAL_BYTES: usize = 32 << 20;
/// Most pixels that an image may claim to have.
pub const PIXELS: u64 = 1 << 24;

/// Which images are taken.
#[derive(Debug, Clone)]
pub struct ImageSettings {
    /// Whether they are fetched from other servers.
    pub remote: bool,
    /// Most bytes of one.
    pub bytes: usize,
    /// Addresses that count as public ones; for tests, which have no others.
    pub reachable: Vec<IpAddr>,
}

impl Default for ImageSettings {
    fn default() -> Self {
        Self {
            remote: false,
            bytes: 10 << 20,
            reachable: Vec::new(),
        }
    }
}

/// Why an image is not taken. The texts say nothing of this machine, its network, or what a server answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// Fetching is off.
    #[error(
        "this server fetches no images; send a `data:` URL, or start it with --allow-remote-images"
    )]
    RemoteOff,
    /// Not a URL of a kind that is known.
    #[error("an image's URL must be a complete `data:`, `https:` or `http:` one")]
    BadUrl,
    /// A `data:` URL that is not base64.
    #[error("a `data:` URL must be written `data:image/png;base64,...` with valid base64")]
    BadData,
    /// Its host is not one of the internet.
    #[error("the host of an image's URL has no public address; send a `data:` URL")]
    NotPublic,
    /// Too many redirects.
    #[error("an image's URL is redirected too often; send the last one")]
    Redirected,
    /// Its server refused.
    #[error("the server of an image answered with status {0}; send another URL or a `data:` one")]
    Status(u16),
    /// No server, or one that breaks off.
    #[error("an image could not be fetched; send another URL or a `data:` one")]
    Unreachable,
    /// Too slow a server.
    #[error("an image did not arrive within {0} s; send another URL or a `data:` one")]
    Slow(u64),
    /// Too many at once.
    #[error("too many images are being fetched; retry shortly")]
    Busy,
    /// Too many bytes.
    #[error("an image has more than {0} bytes; scale it down")]
    TooLarge(usize),
    /// Too many bytes together.
    #[error(
        "the images of a request have more than {TOTAL_BYTES} bytes together; scale them down or send fewer"
    )]
    TooLargeTogether,
    /// Too many images.
    #[error("a request has at most {MOST} images, {0} were sent; send fewer")]
    TooMany(usize),
    /// Bytes of something else.
    #[error("an image is none of PNG, JPEG, WebP and GIF, or its header is broken")]
    Unreadable,
    /// Its header claims too much.
    #[error("an image has {width} x {height} pixels and at most {PIXELS} are read; scale it down")]
    TooManyPixels {
        /// Pixels across.
        width: u64,
        /// Pixels down.
        height: u64,
    },
    /// Markers without images, or images without markers.
    #[error(
        "{images} images and {places} places for one (`{marker}`) were sent; write it for images only, once for each"
    )]
    Misplaced {
        /// Images of the request.
        images: usize,
        /// Places in its text.
        places: usize,
        /// The text that stands for an image.
        marker: String,
    },
    /// The shards do not say how to count it.
    #[error(
        "the model says that it takes images and not how many tokens they become; look into the shards' log"
    )]
    Uncounted,
}
