//! Made-up workloads, the same for the same seed.
//!
//! Each plays one way of using a model, for an hour of 512-token blocks. They know nothing of any
//! recorded trace: policies are designed on them, so that traces stay a test.

#![expect(clippy::cast_sign_loss, reason = "times and counts are not negative")]

use std::ops::Range;

use clap::ValueEnum;

use super::request::TracedRequest;

/// Tokens of a block.
pub const BLOCK_TOKENS: u32 = 512;

/// Length of every workload.
const SECONDS: f64 = 3600.0;

/// A prompt is not continued beyond so many blocks.
const CONTEXT_BLOCKS: usize = 250;

/// A way of using a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Workload {
    /// Conversations of several turns below a few system prompts.
    Chat,
    /// Questions about documents, some of which are asked about often, and which go out of fashion.
    Rag,
    /// Agents whose prompt grows with every call of a tool, most of them quick, some slow.
    Agents,
    /// Conversations, and long prompts that never come back.
    Scans,
    /// Conversations, then from one moment to the next documents, then agents.
    Change,
    /// One tenant asks about documents and converses; another goes through its own texts in a
    /// circle.
    Tenants,
}

impl Workload {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Chat, Self::Rag, Self::Agents, Self::Scans, Self::Change, Self::Tenants];
}

/// A workload with its seed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Synthetic {
    /// Which.
    pub workload: Workload,
    /// Of its randomness.
    pub seed: u64,
    /// How many times as many requests as usual, in percent.
    pub load_percent: u32,
}

impl Synthetic {
    /// Its name in reports.
    pub fn name(self) -> String {
        let name = self.workload.to_possible_value().map_or(String::new(), |value| value.get_name().to_owned());
        format!("{name} (seed {})", self.seed)
    }

    /// Its requests in the order of time.
    pub fn requests(self) -> Vec<TracedRequest> {
        let mut player = Player {
            random: fastrand::Rng::with_seed(self.seed),
            next_block: 0,
            load: f64::from(self.load_percent) / 100.0,
            prompts: Vec::new(),
            tenants: Vec::new(),
        };
        match self.workload {
            Workload::Chat => player.chat(0.0, SECONDS, 1.2),
            Workload::Rag => player.rag(0.0, SECONDS, 3.0),
            Workload::Agents => player.agents(0.0, SECONDS, 0.25),
            Workload::Scans => {
                player.chat(0.0, SECONDS, 0.8);
                player.scans(0.0, SECONDS, 0.5);
            }
            Workload::Change => {
                player.chat(0.0, SECONDS / 2.0, 1.2);
                player.rag(SECONDS / 2.0, SECONDS / 4.0, 3.0);
                player.agents(SECONDS * 3.0 / 4.0, SECONDS / 4.0, 0.4);
            }
            Workload::Tenants => {
                player.rag(0.0, SECONDS, 1.5);
                player.chat(0.0, SECONDS, 0.4);
                let quiet = 0..player.next_block;
                player.circle(0.0, SECONDS, 0.25);
                let scan = quiet.end..player.next_block;
                player.tenants = vec![(quiet, "quiet"), (scan, "scan")];
            }
        }
        player.into_requests()
    }
}

/// Makes prompts up.
struct Player {
    random: fastrand::Rng,
    next_block: u64,
    load: f64,
    /// When each prompt comes, in seconds, and its blocks.
    prompts: Vec<(f64, Vec<u64>)>,
    /// Blocks whose requests belong to a tenant, by ranges of their first one.
    tenants: Vec<(Range<u64>, &'static str)>,
}

impl Player {
    fn fresh(&mut self, count: u64) -> impl Iterator<Item = u64> + use<> {
        let from = self.next_block;
        self.next_block += count;
        from..self.next_block
    }

    fn between(&mut self, least: u64, most: u64) -> u64 {
        self.random.u64(least..=most)
    }

    /// A waiting time of this mean, without memory.
    fn waiting(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.random.f64()).ln()
    }

    /// A number below `count`, of which small ones are the more likely: each half of the ranks, in
    /// logarithms, is as likely as the other.
    fn popular(&mut self, count: usize) -> usize {
        ((count as f64).powf(self.random.f64()) as usize).saturating_sub(1)
    }

    fn texts(&mut self, count: usize, least: u64, most: u64) -> Vec<Vec<u64>> {
        (0..count)
            .map(|_| {
                let blocks = self.between(least, most);
                self.fresh(blocks).collect()
            })
            .collect()
    }

    fn chat(&mut self, begin: f64, seconds: f64, rate: f64) {
        let system = self.texts(4, 1, 3);
        let (mut arrival, end) = (begin, begin + seconds);
        loop {
            arrival += self.waiting(1.0 / (rate * self.load));
            if arrival >= end {
                return;
            }
            let mut prompt = system[self.popular(system.len())].clone();
            let mut at = arrival;
            while at < end && prompt.len() < CONTEXT_BLOCKS {
                let question = 1 + self.waiting(5.0) as u64;
                prompt.extend(self.fresh(question));
                self.prompts.push((at, prompt.clone()));
                if self.random.f64() < 0.35 {
                    break;
                }
                let answer = 1 + self.waiting(1.0) as u64;
                prompt.extend(self.fresh(answer));
                at += 5.0 + self.waiting(90.0);
            }
        }
    }

    fn rag(&mut self, begin: f64, seconds: f64, rate: f64) {
        let system: Vec<u64> = self.fresh(2).collect();
        let documents = self.texts(2000, 4, 30);
        let (mut at, end) = (begin, begin + seconds);
        loop {
            at += self.waiting(1.0 / (rate * self.load));
            if at >= end {
                return;
            }
            // A tenth of the ranks passes in the workload's time.
            let drift = ((at - begin) / seconds * documents.len() as f64 / 10.0) as usize;
            let document = &documents[(self.popular(documents.len()) + drift) % documents.len()];
            let question = self.next_block;
            self.next_block += 1;
            self.prompts.push((at, system.iter().chain(document).copied().chain([question]).collect()));
        }
    }

    fn agents(&mut self, begin: f64, seconds: f64, rate: f64) {
        let system = self.texts(6, 6, 13);
        let (mut arrival, end) = (begin, begin + seconds);
        loop {
            arrival += self.waiting(1.0 / (rate * self.load));
            if arrival >= end {
                return;
            }
            let mut prompt = system[self.popular(system.len())].clone();
            let task = self.between(1, 3);
            prompt.extend(self.fresh(task));
            let mut at = arrival;
            for _ in 0..=self.waiting(15.0) as u64 {
                if at >= end || prompt.len() >= CONTEXT_BLOCKS {
                    break;
                }
                self.prompts.push((at, prompt.clone()));
                let result = 1 + self.waiting(2.0) as u64;
                prompt.extend(self.fresh(result));
                let slow = self.random.f64() < 0.15;
                at += 1.0 + self.waiting(if slow { 120.0 } else { 6.0 });
            }
        }
    }

    fn scans(&mut self, begin: f64, seconds: f64, rate: f64) {
        let (mut at, end) = (begin, begin + seconds);
        loop {
            at += self.waiting(1.0 / (rate * self.load));
            if at >= end {
                return;
            }
            let blocks = 10 + self.waiting(40.0) as u64;
            let prompt = self.fresh(blocks).collect();
            self.prompts.push((at, prompt));
        }
    }

    fn circle(&mut self, begin: f64, seconds: f64, rate: f64) {
        let texts = self.texts(50, 100, 100);
        let (mut at, mut next) = (begin, 0);
        while at < begin + seconds {
            self.prompts.push((at, texts[next].clone()));
            next = (next + 1) % texts.len();
            at += 1.0 / (rate * self.load);
        }
    }

    fn into_requests(mut self) -> Vec<TracedRequest> {
        self.prompts.sort_by(|(one, _), (other, _)| one.total_cmp(other));
        let tenant = |first: Option<&u64>| {
            let of_it = |(range, _): &&(Range<u64>, &str)| first.is_some_and(|first| range.contains(first));
            self.tenants.iter().find(of_it).map(|(_, name)| (*name).to_owned())
        };
        let request = |(at, blocks): (f64, Vec<u64>)| TracedRequest {
            tenant: tenant(blocks.first()),
            at_ms: (at * 1e3) as u64,
            prompt_tokens: blocks.len() as u32 * BLOCK_TOKENS,
            answer_tokens: BLOCK_TOKENS,
            blocks,
            block_tokens: None,
        };
        self.prompts.into_iter().map(request).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn a_seed_is_a_workload_and_another_seed_another() {
        for workload in Workload::ALL {
            let made = |seed| Synthetic { workload, seed, load_percent: 10 }.requests();
            assert_eq!(made(1), made(1));
            assert_ne!(made(1), made(2));
        }
    }

    #[test]
    fn requests_come_in_the_order_of_time_and_a_block_has_one_prefix() {
        for workload in Workload::ALL {
            let requests = Synthetic { workload, seed: 7, load_percent: 20 }.requests();
            assert!(requests.len() > 50 && requests.is_sorted_by_key(|request| request.at_ms), "{workload:?}");
            let mut parents: HashMap<u64, Option<u64>> = HashMap::new();
            for TracedRequest { blocks, .. } in &requests {
                for (at, block) in blocks.iter().enumerate() {
                    let parent = at.checked_sub(1).map(|before| blocks[before]);
                    assert_eq!(*parents.entry(*block).or_insert(parent), parent, "{workload:?}");
                }
            }
        }
    }
}
