//! Accepts connections and serves them until told to stop: with time limits, and without ever dropping an answer.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::Request;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use crate::patience::Patient;

/// Longest time for a request's headers, and for the wait between two requests.
const HEADERS: Duration = Duration::from_secs(10);
/// A client that takes nothing for so long is gone.
const STALLED_WRITE: Duration = Duration::from_secs(60);
const MAX_HEADERS: usize = 64;
const HEADER_BYTES: usize = 32 * 1024;
const CONNECTIONS: usize = 4096;
const HTTP2_STREAMS: u32 = 100;

/// Serves `routes` on `listener` until `stop`; returns when the last connection is closed.
pub async fn serve(listener: TcpListener, routes: Router, stop: CancellationToken) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let builder = Arc::new(builder());
    loop {
        let accepted = tokio::select! {
            accepted = accept(&listener, &places) => accepted,
            () = stop.cancelled() => break,
        };
        let (stream, place) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of files, most likely; connections that end will give some back.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
        };
        let (builder, routes, stop) = (builder.clone(), routes.clone(), stop.clone());
        tokio::spawn(async move {
            connection(&builder, stream, routes, stop).await;
            drop(place);
        });
    }
    drop(listener);
    // Every connection holds a place, so holding all of them means that none is left.
    let _ = places.acquire_many(CONNECTIONS as u32).await;
}

async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> io::Result<(TcpStream, OwnedSemaphorePermit)> {
    let place = places
        .clone()
        .acquire_owned()
        .await
        .map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    // A token is one small packet; waiting to fill it would add tens of milliseconds.
    stream.set_nodelay(true)?;
    Ok((stream, place))
}

fn builder() -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS)
        .max_headers(MAX_HEADERS)
        .max_buf_size(HEADER_BYTES);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(HTTP2_STREAMS)
        .max_header_list_size(HEADER_BYTES as u32)
        .keep_alive_interval(Duration::from_secs(30));
    builder
}

async fn connection(
    builder: &Builder<TokioExecutor>,
    stream: TcpStream,
    routes: Router,
    stop: CancellationToken,
) {
    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
        routes.clone().oneshot(request.map(Body::new))
    });
    let io = TokioIo::new(Patient::new(stream, STALLED_WRITE));
    let connection = builder.serve_connection(io, service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            // Answers under way go on to their end; no further request is read.
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "connection ended");
    }
}
