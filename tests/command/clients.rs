//! Clients that send slowly, do not read, or keep connections open: what they cost is bounded, and
//! they are cut.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::fleet::{RouterProcess, Server, Work, engine, eventually};

const STREAM: &str = r#"{"model": "m", "prompt": "x", "stream": true}"#;
/// Far more than the systems' buffers between an engine and a client hold.
const UNREAD_MAX: u64 = 64 << 20;

fn post(body: &str) -> String {
    format!(
        "POST /v1/completions HTTP/1.1\r\nhost: r\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

async fn connect(address: SocketAddr) -> TcpStream {
    TcpStream::connect(address).await.expect("a connection")
}

/// Sends one byte now and then until the other side ends the connection. What it said before.
async fn trickle(mut stream: TcpStream, mut bytes: impl Iterator<Item = u8>) -> String {
    let mut said = Vec::new();
    loop {
        let mut part = [0; 512];
        tokio::select! {
            read = stream.read(&mut part) => match read {
                Ok(count) if count > 0 => said.extend_from_slice(&part[..count]),
                _ => return String::from_utf8_lossy(&said).into_owned(),
            },
            () = tokio::time::sleep(Duration::from_millis(50)) => {
                // Refused where the connection has ended, which the next look notices.
                let _ = stream.write_all(&[bytes.next().expect("it is cut before that")]).await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_never_reads_is_cut_and_its_request_to_the_engine_ended() {
    let work = Arc::new(Work::default());
    let router = RouterProcess::start(&engine(&work).await, &["--client-stall-s", "1"]).await;
    let mut client = connect(router.http).await;
    client.write_all(post(STREAM).as_bytes()).await.expect("sent");
    router.reaches(r#"kvcellar_route_clients_cut_total{reason="stalled_answer"}"#, 1).await;
    router.reaches(r#"kvcellar_route_outcomes_total{engine="a",outcome="aborted"}"#, 1).await;
    eventually("the engine is done with it", || async { (work.open.load(Ordering::Relaxed) == 0).then_some(()) }).await;
    let bytes = work.bytes.load(Ordering::Relaxed);
    assert!(0 < bytes && bytes < UNREAD_MAX, "the engine was held back: it wrote {bytes} bytes");
    assert_eq!(router.metric("kvcellar_route_client_connections").await, 0);
    drop(client);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_reads_is_not_cut() {
    let work = Arc::new(Work::default());
    let router = RouterProcess::start(&engine(&work).await, &["--client-stall-s", "1"]).await;
    let mut client = connect(router.http).await;
    client.write_all(post(STREAM).as_bytes()).await.expect("sent");
    let mut part = vec![0; 1 << 20];
    let mut bytes = 0;
    while bytes < UNREAD_MAX as usize {
        bytes += client.read(&mut part).await.expect("it goes on").max(1);
    }
    assert_eq!(router.metric(r#"kvcellar_route_clients_cut_total{reason="stalled_answer"}"#).await, 0);
    assert_eq!(work.open.load(Ordering::Relaxed), 1, "it goes on");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_trickles_in_is_cut_and_an_idle_connection_is_none() {
    let router = RouterProcess::start(&engine(&Arc::default()).await, &["--client-head-s", "1"]).await;
    let idle = connect(router.http).await;
    let said =
        trickle(connect(router.http).await, b"GET / HTTP/1.1\r\nx: ".iter().copied().chain(std::iter::repeat(b'x')))
            .await;
    assert_eq!(said, "");
    router.reaches(r#"kvcellar_route_clients_cut_total{reason="slow_head"}"#, 1).await;
    // Its time is over, too.
    router.reaches("kvcellar_route_client_connections", 0).await;
    assert_eq!(router.metric(r#"kvcellar_route_clients_cut_total{reason="slow_head"}"#).await, 1);
    drop(idle);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_trickles_in_is_refused_and_its_connection_ended() {
    let router = RouterProcess::start(&engine(&Arc::default()).await, &["--client-stall-s", "1"]).await;
    let mut client = connect(router.http).await;
    client
        .write_all(post(&" ".repeat(1 << 20)).split_once("\r\n\r\n").expect("a head").0.as_bytes())
        .await
        .expect("sent");
    client.write_all(b"\r\n\r\n").await.expect("sent");
    let said = trickle(client, std::iter::repeat(b' ')).await;
    assert!(said.starts_with("HTTP/1.1 408 ") && said.contains("slow_body"), "{said}");
    assert_eq!(router.metric(r#"kvcellar_route_clients_cut_total{reason="slow_body"}"#).await, 1);
    assert_eq!(router.metric(r#"kvcellar_route_refused_total{reason="slow_body"}"#).await, 1);
    router.reaches("kvcellar_route_client_connections", 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_keeps_its_pace_may_take_longer_than_a_stall() {
    let router = RouterProcess::start(&engine(&Arc::default()).await, &["--client-stall-s", "1"]).await;
    let mut client = connect(router.http).await;
    let request = post(&format!(r#"{{"model": "m", "prompt": "{}"}}"#, "x".repeat(60_000)));
    // 40 KiB a second, of which 4 are asked for.
    for part in request.as_bytes().chunks(4_000) {
        client.write_all(part).await.expect("sent");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let mut said = [0; 15];
    client.read_exact(&mut said).await.expect("an answer");
    assert_eq!(&said, b"HTTP/1.1 200 OK");
}

#[tokio::test(flavor = "multi_thread")]
async fn at_the_bound_of_connections_those_that_say_nothing_make_room() {
    let router = RouterProcess::start(&engine(&Arc::default()).await, &["--connections", "2"]).await;
    let silent = [connect(router.http).await, connect(router.http).await];
    router.reaches("kvcellar_route_client_connections", 2).await;
    let mut client = connect(router.http).await;
    client.write_all(b"GET /v1/models HTTP/1.1\r\nhost: r\r\n\r\n").await.expect("sent");
    let mut said = [0; 15];
    client.read_exact(&mut said).await.expect("an answer");
    assert_eq!(&said, b"HTTP/1.1 200 OK");
    assert!(router.metric(r#"kvcellar_route_clients_cut_total{reason="silent"}"#).await > 0);
    drop(silent);
}

#[tokio::test(flavor = "multi_thread")]
async fn at_the_bound_of_connections_idle_ones_make_room_and_busy_ones_are_waited_for() {
    let work = Arc::new(Work::default());
    let router = RouterProcess::start(&engine(&work).await, &["--connections", "2"]).await;
    let models = b"GET /v1/models HTTP/1.1\r\nhost: r\r\n\r\n";
    let mut said = [0; 15];
    let mut idle = Vec::new();
    // Each keeps its connection.
    for _ in 0..5 {
        let mut client = connect(router.http).await;
        client.write_all(models).await.expect("sent");
        client.read_exact(&mut said).await.expect("an answer");
        assert_eq!(&said, b"HTTP/1.1 200 OK");
        idle.push(client);
        assert!(router.metric("kvcellar_route_client_connections").await <= 2);
    }
    let log = router.server.log();
    assert_eq!(log.matches("all 2 connections are in use").count(), 1, "{log}");
    let mut busy = Vec::new();
    for _ in 0..2 {
        let mut client = connect(router.http).await;
        client.write_all(post(STREAM).as_bytes()).await.expect("sent");
        client.read_exact(&mut said).await.expect("an answer");
        busy.push(client);
    }
    let mut last = connect(router.http).await;
    last.write_all(models).await.expect("sent");
    // The admin address has places of its own.
    assert_eq!(router.metric("kvcellar_route_client_connections").await, 2);
    assert_eq!(work.open.load(Ordering::Relaxed), 2, "both go on");
    drop(busy.pop());
    last.read_exact(&mut said).await.expect("an answer");
    assert_eq!(&said, b"HTTP/1.1 200 OK");
    eventually("one goes on", || async { (work.open.load(Ordering::Relaxed) == 1).then_some(()) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_index_has_the_same_bounds() {
    let index = Server::start(&[
        "index",
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--engine",
        "tcp://127.0.0.1:9",
        "--client-stall-s",
        "1",
    ]);
    let address = index.address("index at http://").await;
    let mut client = connect(address).await;
    let head =
        "POST /v1/score HTTP/1.1\r\nhost: i\r\ncontent-type: application/json\r\ncontent-length: 1000000\r\n\r\n";
    client.write_all(head.as_bytes()).await.expect("sent");
    let said = trickle(client, std::iter::repeat(b' ')).await;
    assert!(said.starts_with("HTTP/1.1 400 "), "{said}");
    let metrics = reqwest::get(format!("http://{address}/metrics")).await.expect("metrics").text().await.expect("text");
    assert!(metrics.contains(r#"kvcellar_index_clients_cut_total{reason="slow_body"} 1"#), "{metrics}");
}
