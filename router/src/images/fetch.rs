//! Images from other servers: only where that is allowed, only from the internet, and only for a bounded time.
//!
//! A host is resolved once, by the resolver that also gives the address to connect to, so what was checked is what is used.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::header::LOCATION;
use reqwest::redirect::Policy;
use reqwest::{Client, Response, Url};
use tokio::sync::Semaphore;

use super::address::is_public;
use super::{ImageError, ImageSettings, data_url};

/// Longest time for one image, redirects included.
const TIME: Duration = Duration::from_secs(5);
/// Images fetched at the same time.
const AT_ONCE: usize = 8;
/// Redirects that are followed.
const REDIRECTS: usize = 3;

/// Gets the bytes of images.
pub struct Fetcher {
    /// `None` where fetching is off.
    client: Option<Client>,
    reachable: Reachable,
    most: usize,
    slots: Semaphore,
}

impl Fetcher {
    /// Fetches within these settings.
    pub fn new(settings: &ImageSettings) -> Self {
        let reachable = Reachable(settings.reachable.clone().into());
        let client = settings.remote.then(|| client(reachable.clone()));
        Self {
            client: client.and_then(|built| {
                built
                    .inspect_err(|error| tracing::error!(%error, "no images can be fetched"))
                    .ok()
            }),
            reachable,
            most: settings.bytes,
            slots: Semaphore::new(AT_ONCE),
        }
    }

    /// The bytes behind a `data:`, `https:` or `http:` URL.
    pub async fn get(&self, url: &str) -> Result<Vec<u8>, ImageError> {
        if data_url::is_data_url(url) {
            return data_url::decode(url, self.most);
        }
        let url = Url::parse(url).map_err(|_| ImageError::BadUrl)?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(ImageError::BadUrl);
        }
        let client = self.client.as_ref().ok_or(ImageError::RemoteOff)?;
        let whole = async {
            let _slot = self.slots.acquire().await.map_err(|_| ImageError::Busy)?;
            self.follow(client, url).await
        };
        let late = |_| ImageError::Slow(TIME.as_secs());
        tokio::time::timeout(TIME, whole).await.map_err(late)?
    }

    async fn follow(&self, client: &Client, mut url: Url) -> Result<Vec<u8>, ImageError> {
        for _ in 0..=REDIRECTS {
            self.check(&url)?;
            let response = client
                .get(url.clone())
                .send()
                .await
                .map_err(|error| refused(&error))?;
            if !response.status().is_redirection() {
                return self.read(response).await;
            }
            let next = response
                .headers()
                .get(LOCATION)
                .and_then(|place| place.to_str().ok());
            let next = next.and_then(|place| url.join(place).ok());
            url = next.ok_or(ImageError::Unreachable)?;
        }
        Err(ImageError::Redirected)
    }

    /// An address written into a URL never meets the resolver, so it is looked at here.
    fn check(&self, url: &Url) -> Result<(), ImageError> {
        let anonymous = url.username().is_empty() && url.password().is_none();
        if !anonymous || !matches!(url.scheme(), "http" | "https") {
            return Err(ImageError::BadUrl);
        }
        let host = url.host_str().ok_or(ImageError::BadUrl)?;
        match host.trim_matches(['[', ']']).parse::<IpAddr>() {
            Ok(address) if !self.reachable.has(address) => Err(ImageError::NotPublic),
            _ => Ok(()),
        }
    }

    async fn read(&self, response: Response) -> Result<Vec<u8>, ImageError> {
        if !response.status().is_success() {
            return Err(ImageError::Status(response.status().as_u16()));
        }
        let announced = response.content_length().unwrap_or(0);
        let mut fits = announced <= self.most as u64;
        let (mut bytes, mut pieces) = (Vec::new(), response.bytes_stream());
        while fits && let Some(piece) = pieces.next().await {
            let piece = piece.map_err(|_| ImageError::Unreachable)?;
            fits = bytes.len() + piece.len() <= self.most;
            bytes.extend_from_slice(&piece);
        }
        match fits {
            true => Ok(bytes),
            false => Err(ImageError::TooLarge(self.most)),
        }
    }
}

fn client(reachable: Reachable) -> reqwest::Result<Client> {
    Client::builder()
        .dns_resolver(Arc::new(reachable))
        .redirect(Policy::none())
        .referer(false)
        // A proxy would resolve names by itself.
        .no_proxy()
        .user_agent("kvrun")
        .build()
}

/// Which addresses may be connected to.
#[derive(Clone)]
struct Reachable(Arc<[IpAddr]>);

impl Reachable {
    fn has(&self, address: IpAddr) -> bool {
        is_public(address) || self.0.contains(&address)
    }
}

/// A name without an address that may be connected to.
#[derive(Debug, thiserror::Error)]
#[error("no public address")]
struct NotPublic;

impl Resolve for Reachable {
    fn resolve(&self, name: Name) -> Resolving {
        let own = self.clone();
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let allowed: Vec<SocketAddr> = found.filter(|found| own.has(found.ip())).collect();
            match allowed.is_empty() {
                true => Err(NotPublic.into()),
                false => Ok(Box::new(allowed.into_iter()) as Addrs),
            }
        })
    }
}

fn refused(error: &reqwest::Error) -> ImageError {
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(error) = cause {
        if error.is::<NotPublic>() {
            return ImageError::NotPublic;
        }
        cause = error.source();
    }
    ImageError::Unreachable
}
