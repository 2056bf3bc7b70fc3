//! What routers tell each other.

use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::books::Promise;

/// The version of what is written here. Routers of different ones share nothing.
pub const VERSION: u32 = 1;

/// Something that happened at a router. Heard twice it has the effect of once, but for
/// [`News::Credit`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum News {
    /// An engine got a request.
    Booked {
        /// The engine's name.
        #[serde(with = "name")]
        engine: Arc<str>,
        /// The request's number at this engine and router.
        number: u64,
        /// Tokens of its prompt.
        tokens: u32,
        /// Of those, how many the engine need not compute.
        held: u32,
        /// Its first token will be seen when it comes.
        streams: bool,
    },
    /// Its first token has come.
    Answered {
        /// The engine's name.
        #[serde(with = "name")]
        engine: Arc<str>,
        /// The request's number.
        number: u64,
    },
    /// It has ended.
    Ended {
        /// The engine's name.
        #[serde(with = "name")]
        engine: Arc<str>,
        /// The request's number.
        number: u64,
    },
    /// A session's requests go to an engine.
    Session {
        /// The session: a hash of its name.
        session: u64,
        /// The engine's name.
        #[serde(with = "name")]
        engine: Arc<str>,
    },
    /// What a prefix has lost by waiting has changed.
    Credit {
        /// The key of its last block.
        prefix: u64,
        /// By how much, in s.
        change_s: f64,
    },
    /// What a prefix has lost in all: in a snapshot.
    CreditIs {
        /// The key of its last block.
        prefix: u64,
        /// How much, in s.
        credit_s: f64,
    },
    /// An engine got a prompt, and probably holds it.
    Given {
        /// The engine's name.
        #[serde(with = "name")]
        engine: Arc<str>,
        /// Hashes of its blocks, as in [`crate::estimate`].
        hashes: Vec<u64>,
    },
}

impl News {
    /// A request as it is promised.
    pub fn booked(engine: &Arc<str>, number: u64, promise: Promise) -> Self {
        let Promise { tokens, held, streams } = promise;
        Self::Booked { engine: Arc::clone(engine), number, tokens, held, streams }
    }

    /// Bytes that it takes in memory, about.
    pub(super) fn bytes(&self) -> usize {
        let hashes = if let Self::Given { hashes, .. } = self { hashes.len() } else { 0 };
        size_of::<Self>() + hashes * size_of::<u64>()
    }
}

/// A router's answer to another one that asks for its news.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PeerNews {
    /// [`VERSION`] of the one who tells.
    pub version: u32,
    /// Who tells: another number after each start.
    pub instance: u64,
    /// Models that its engines serve, adapters left out; empty: not known yet.
    pub models: Vec<String>,
    /// This is all there is, and not only what is new.
    pub is_snapshot: bool,
    /// What to ask for the next time.
    pub next: u64,
    /// What happened, oldest first.
    pub news: Vec<Aged>,
}

/// Something that happened, and the ms that have passed since.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Aged(pub u32, #[serde(with = "held")] pub Arc<News>);

impl Aged {
    /// Something that happened so many seconds ago.
    pub fn new(ago_s: f64, news: News) -> Self {
        Self::of(ago_s, Arc::new(news))
    }

    /// The same of news that others hold, too.
    #[expect(clippy::cast_sign_loss, reason = "a time that has passed is not below zero")]
    pub fn of(ago_s: f64, news: Arc<News>) -> Self {
        Self((ago_s.max(0.0) * 1e3) as u32, news)
    }

    /// The seconds that have passed since.
    pub fn ago_s(&self) -> f64 {
        f64::from(self.0) / 1e3
    }
}

/// A name that several hold is written as text.
mod name {
    use super::{Arc, Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(name: &Arc<str>, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(name)
    }

    pub(super) fn deserialize<'d, D: Deserializer<'d>>(deserializer: D) -> Result<Arc<str>, D::Error> {
        String::deserialize(deserializer).map(Into::into)
    }
}

/// News that several hold are written as themselves.
mod held {
    use super::{Arc, Deserialize, Deserializer, News, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(news: &Arc<News>, serializer: S) -> Result<S::Ok, S::Error> {
        news.as_ref().serialize(serializer)
    }

    pub(super) fn deserialize<'d, D: Deserializer<'d>>(deserializer: D) -> Result<Arc<News>, D::Error> {
        News::deserialize(deserializer).map(Arc::new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_is_read_again() {
        let news = [
            News::booked(&"a".into(), 1, Promise { tokens: 9, held: 4, streams: true }),
            News::Session { session: u64::MAX, engine: "b".into() },
            News::Credit { prefix: u64::MAX - 1, change_s: -0.25 },
            News::Given { engine: "a".into(), hashes: vec![u64::MAX, 3] },
        ];
        let news: Vec<Aged> = news.into_iter().map(|it| Aged::new(0.25, it)).collect();
        let told = PeerNews { version: VERSION, instance: 7, models: Vec::new(), is_snapshot: true, next: 4, news };
        let text = serde_json::to_string(&told).expect("JSON");
        assert!(text.contains(r#"[250,{"booked":{"engine":"a","number":1,"#), "{text}");
        assert_eq!(serde_json::from_str::<PeerNews>(&text).expect("news").news, told.news);
    }
}
