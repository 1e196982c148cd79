//! Images from other servers: taken where allowed, never from this machine's side of the network.
#![allow(clippy::unwrap_used)]

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use axum::Router;
use axum::http::StatusCode;
use axum::response::Redirect;
use axum::routing::get;
use kvrun_router::images::{Fetcher, ImageError, ImageSettings};

const LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const MOST: usize = 4000;
const IMAGE: &[u8] = b"bytes of an image";

/// A server of images on this machine; answers with its port.
async fn images() -> u16 {
    let listener = tokio::net::TcpListener::bind((LOCAL, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let to = |place: String| get(move || async move { Redirect::temporary(&place) });
    let endless = || async {
        let pieces = futures::stream::repeat_with(|| Ok::<_, std::io::Error>(vec![0u8; 1000]));
        axum::body::Body::from_stream(pieces)
    };
    let routes = Router::new()
        .route("/image", get(|| async { IMAGE }))
        .route("/here", to("/image".to_owned()))
        .route("/inside", to(format!("http://127.0.0.2:{port}/image")))
        .route("/metadata", to("http://169.254.169.254/latest".to_owned()))
        .route("/file", to("file:///etc/passwd".to_owned()))
        .route("/round", to("/round".to_owned()))
        .route("/large", get(|| async { vec![0u8; MOST + 1] }))
        .route("/endless", get(endless))
        .route(
            "/slow",
            get(|| async { tokio::time::sleep(Duration::from_secs(60)).await }),
        )
        .route("/gone", get(|| async { StatusCode::GONE }));
    tokio::spawn(async move { axum::serve(listener, routes).await });
    port
}

fn fetcher(remote: bool, reachable: &[IpAddr]) -> Fetcher {
    Fetcher::new(&ImageSettings {
        remote,
        bytes: MOST,
        reachable: reachable.to_vec(),
    })
}

#[tokio::test]
async fn images_are_fetched_within_bounds() {
    let port = images().await;
    let fetcher = fetcher(true, &[LOCAL]);
    let get =
        async |host: &str, path: &str| fetcher.get(&format!("http://{host}:{port}{path}")).await;
    assert_eq!(get("127.0.0.1", "/image").await, Ok(IMAGE.to_vec()));
    assert_eq!(get("localhost", "/image").await, Ok(IMAGE.to_vec()));
    assert_eq!(get("127.0.0.1", "/here").await, Ok(IMAGE.to_vec()));
    assert_eq!(
        get("127.0.0.1", "/inside").await,
        Err(ImageError::NotPublic)
    );
    assert_eq!(
        get("127.0.0.1", "/metadata").await,
        Err(ImageError::NotPublic)
    );
    assert_eq!(get("127.0.0.1", "/file").await, Err(ImageError::BadUrl));
    assert_eq!(
        get("127.0.0.1", "/round").await,
        Err(ImageError::Redirected)
    );
    assert_eq!(
        get("127.0.0.1", "/large").await,
        Err(ImageError::TooLarge(MOST))
    );
    assert_eq!(
        get("127.0.0.1", "/endless").await,
        Err(ImageError::TooLarge(MOST))
    );
    assert_eq!(
        get("127.0.0.1", "/gone").await,
        Err(ImageError::Status(410))
    );
    assert_eq!(
        get("user:word@127.0.0.1", "/image").await,
        Err(ImageError::BadUrl)
    );
    let begun = Instant::now();
    assert_eq!(get("127.0.0.1", "/slow").await, Err(ImageError::Slow(5)));
    assert!(begun.elapsed() < Duration::from_secs(60));
}

#[tokio::test]
async fn nothing_on_this_side_of_the_network_is_asked() {
    let port = images().await;
    let open = fetcher(true, &[]);
    for host in [
        "127.0.0.1",
        "localhost",
        "[::1]",
        "2130706433",
        "0x7f.1",
        "[::ffff:127.0.0.1]",
        "0.0.0.0",
        "10.0.0.1",
    ] {
        let found = open.get(&format!("http://{host}:{port}/image")).await;
        assert_eq!(found, Err(ImageError::NotPublic), "{host}");
    }
    let closed = fetcher(false, &[LOCAL]);
    let found = closed.get(&format!("http://127.0.0.1:{port}/image")).await;
    assert_eq!(found, Err(ImageError::RemoteOff));
    for url in ["ftp://example.com/x", "image.png", "", "http://"] {
        assert_eq!(open.get(url).await, Err(ImageError::BadUrl), "{url}");
    }
}
