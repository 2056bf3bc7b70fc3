//! Publishers that break the protocol: nothing that they announce costs memory, their lines are
//! dropped and made again.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::fleet::{Server, eventually};

const LONG: u8 = 2;

/// Shakes hands as libzmq's PUB does, and waits for the subscription.
async fn shake_hands(stream: &mut TcpStream) {
    let mut greeting = [0; 64];
    (greeting[0], greeting[9], greeting[10], greeting[11]) = (0xff, 0x7f, 3, 1);
    greeting[12..16].copy_from_slice(b"NULL");
    stream.write_all(&greeting).await.expect("sent");
    let mut theirs = [0; 64];
    stream.read_exact(&mut theirs).await.expect("a greeting");
    let ready = b"\x05READY\x0bSocket-Type\0\0\0\x03PUB";
    stream.write_all(&[4, ready.len() as u8]).await.expect("sent");
    stream.write_all(ready).await.expect("sent");
    let mut command = [0; 2];
    stream.read_exact(&mut command).await.expect("a command");
    let mut body = vec![0; command[1].into()];
    stream.read_exact(&mut body).await.expect("its body");
    let mut subscription = [0; 3];
    stream.read_exact(&mut subscription).await.expect("a subscription");
    assert_eq!(subscription, [0, 1, 1], "to everything");
}

async fn announce(stream: &mut TcpStream, bytes: u64) {
    stream.write_all(&[LONG]).await.expect("sent");
    stream.write_all(&bytes.to_be_bytes()).await.expect("sent");
}

/// A number of `/proc/PID/status`, in bytes.
fn memory(process: u32, name: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).expect("its status");
    let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a line");
    line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).expect("a number") * 1024
}

#[tokio::test(flavor = "multi_thread")]
async fn an_announced_frame_of_gigabytes_costs_the_line_and_no_memory() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let source = format!("tcp://{}", listener.local_addr().expect("an address"));
    let lines = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&lines);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            shake_hands(&mut stream).await;
            let sizes = [4 << 30, u64::MAX, 1 << 40];
            announce(&mut stream, sizes[counted.fetch_add(1, Ordering::Relaxed) as usize % 3]).await;
            // As much as is taken, until the line is dropped.
            let part = vec![0; 64 << 10];
            while stream.write_all(&part).await.is_ok() {}
        }
    });
    let index = Server::start(&["index", "serve", "--listen", "127.0.0.1:0", "--engine", &source]);
    let address = index.address("index at http://").await;
    eventually("it is told", || async { index.log().contains("its line is dropped").then_some(()) }).await;
    let (resident, virtual_) = (memory(index.id(), "VmHWM:"), memory(index.id(), "VmPeak:"));
    eventually("the line is made again and again", || async { (lines.load(Ordering::Relaxed) >= 5).then_some(()) })
        .await;
    let grown = |name, before| memory(index.id(), name).saturating_sub(before);
    assert!(grown("VmHWM:", resident) < 8 << 20, "resident memory grew by {}", grown("VmHWM:", resident));
    assert!(grown("VmPeak:", virtual_) < 1 << 30, "address space grew by {}", grown("VmPeak:", virtual_));
    let log = index.log();
    assert!(log.contains("a message of 4294967296 bytes is announced"), "{log}");
    let engines =
        reqwest::get(format!("http://{address}/v1/engines")).await.expect("an answer").text().await.expect("text");
    assert!(engines.contains("\"engines\":[]"), "{engines}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_that_may_be_takes_memory_only_as_it_comes() {
    const ANNOUNCED: u64 = 64 << 20;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let source = format!("tcp://{}", listener.local_addr().expect("an address"));
    let index = Server::start(&["index", "serve", "--listen", "127.0.0.1:0", "--engine", &source]);
    let (mut stream, _) = listener.accept().await.expect("a line");
    shake_hands(&mut stream).await;
    let before = memory(index.id(), "VmRSS:");
    announce(&mut stream, ANNOUNCED).await;
    // More than the systems' buffers hold is taken out of them.
    stream.write_all(&vec![0; 16 << 20]).await.expect("sent");
    let grown = memory(index.id(), "VmRSS:").saturating_sub(before);
    assert!(grown < ANNOUNCED / 2 + (8 << 20), "resident memory grew by {grown}");
    stream.write_all(&vec![0; 48 << 20]).await.expect("sent");
    // It is whole, and no batch: its line stays.
    let address = index.address("index at http://").await;
    let garbage = || async {
        let engines = reqwest::get(format!("http://{address}/v1/engines")).await.ok()?.text().await.ok()?;
        engines.contains("\"garbage\":1").then_some(())
    };
    eventually("it is counted", garbage).await;
    assert!(!index.log().contains("is dropped"), "{}", index.log());
}
