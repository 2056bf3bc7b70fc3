//! What the index is told to expect: blocks of requests that were sent to an engine, and whose
//! events have not come yet.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::limits;
use kvcellar_index::Index;
use kvcellar_index::roster::EngineId;

type Expectation = (EngineId, Vec<u64>);

/// Tells the index, beside decisions: its writer may be busy.
#[derive(Debug)]
pub struct Expectations {
    index: Arc<Index>,
    sender: mpsc::Sender<Expectation>,
}

impl Expectations {
    /// Begins to tell an index. To be called within a runtime.
    pub fn of(index: Arc<Index>) -> Self {
        let (sender, receiver) = mpsc::channel(limits::EXPECT_QUEUE);
        tokio::spawn(tell(Arc::clone(&index), receiver));
        Self { index, sender }
    }

    /// The index that is told.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// An engine will have blocks with these keys. `false`: too much is waiting, and the index is
    /// not told.
    pub fn expect(&self, engine: EngineId, keys: Vec<u64>) -> bool {
        self.sender.try_send((engine, keys)).is_ok()
    }
}

async fn tell(index: Arc<Index>, mut receiver: mpsc::Receiver<Expectation>) {
    let started = Instant::now();
    let now_ms = || started.elapsed().as_millis() as u64;
    let mut tick = tokio::time::interval(Duration::from_millis(50));
    loop {
        tokio::select! {
            told = receiver.recv() => match told {
                Some((engine, keys)) => index.write().expect(engine, &keys, now_ms() + limits::EXPECT_MS),
                None => return,
            },
            _ = tick.tick() => index.write().expire(now_ms()),
        }
    }
}
