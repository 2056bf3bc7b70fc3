//! Made-up traffic: sessions that arrive at random, each a chain of prompts that begin like the one
//! before.

#![expect(clippy::cast_sign_loss, reason = "simulated times and shares are never below zero")]

use fastrand::Rng;

/// A kind of traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Load {
    /// Many users of few long instructions: each asks once.
    SharedPrefix,
    /// Conversations: the prompt grows with every turn.
    MultiTurn,
    /// Agents: long common tool descriptions, many quick steps, long results of tools.
    Agent,
    /// That of `scripts/quickstart --fleet`: conversations over one of four long instructions, on
    /// engines without a GPU; three requests in flight, each followed by the next.
    Notebooks,
}

/// Conversations that are there from the start, of which so many are answered at a time.
#[derive(Debug, Clone, Copy)]
pub struct ClosedLoop {
    /// Conversations.
    pub sessions: usize,
    /// Requests in flight.
    pub in_flight: usize,
}

/// Tokens of a block.
pub const BLOCK: u32 = 64;

/// What a kind of traffic is made of; lengths in blocks.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Different beginnings for each engine of the fleet.
    pub beginnings: f64,
    /// Their length.
    pub beginning: u32,
    /// What a session adds at first.
    pub first: (u32, u32),
    /// What each later turn adds.
    pub turn: (u32, u32),
    /// Turns of a session.
    pub turns: (u32, u32),
    /// Tokens of an answer.
    pub answer: (u32, u32),
    /// Mean pause between an answer and the next turn, in s.
    pub pause_s: f64,
    /// Sessions that begin each second, for each engine.
    pub rate: f64,
}

impl Load {
    /// All kinds whose sessions arrive at random.
    pub const ALL: [Self; 3] = [Self::SharedPrefix, Self::MultiTurn, Self::Agent];

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::SharedPrefix => "shared-prefix",
            Self::MultiTurn => "multi-turn",
            Self::Agent => "agent",
            Self::Notebooks => "notebooks",
        }
    }

    /// Its conversations, where they are there from the start.
    pub fn closed(self) -> Option<ClosedLoop> {
        (self == Self::Notebooks).then_some(ClosedLoop { sessions: 24, in_flight: 3 })
    }

    /// What it is made of. Rates load an engine to about three quarters when every prefix is found.
    pub fn shape(self) -> Shape {
        match self {
            Self::SharedPrefix => Shape {
                beginnings: 6.0,
                beginning: 96,
                first: (8, 24),
                turn: (0, 0),
                turns: (1, 1),
                answer: (50, 250),
                pause_s: 1.0,
                rate: 4.0,
            },
            Self::MultiTurn => Shape {
                beginnings: 0.5,
                beginning: 16,
                first: (4, 32),
                turn: (2, 16),
                turns: (3, 12),
                answer: (50, 400),
                pause_s: 6.0,
                rate: 0.8,
            },
            Self::Agent => Shape {
                beginnings: 0.5,
                beginning: 128,
                first: (4, 16),
                turn: (4, 48),
                turns: (6, 20),
                answer: (20, 150),
                pause_s: 1.5,
                rate: 0.2,
            },
            Self::Notebooks => Shape {
                beginnings: 2.0,
                beginning: 7,
                first: (2, 3),
                turn: (2, 2),
                turns: (4, 4),
                answer: (16, 16),
                pause_s: 0.0,
                rate: 0.0,
            },
        }
    }
}

/// A session: what it has said so far and how much is left.
#[derive(Debug, Clone)]
pub struct Session {
    /// Blocks of the next prompt, each by a number that stands for its content.
    pub prompt: Vec<u32>,
    /// Tokens of the next answer.
    pub answer: u32,
    /// Its full blocks.
    pub said: Vec<u32>,
    /// Turns after this one.
    pub left: u32,
    /// Of the session alone, so that it is the same however it is routed.
    pub random: Rng,
}

/// Makes sessions of one kind.
#[derive(Debug)]
pub struct Maker {
    shape: Shape,
    beginnings: u32,
    fresh: u32,
}

fn between(random: &mut Rng, (low, high): (u32, u32)) -> u32 {
    random.u32(low..=high)
}

/// A pause with this mean, without memory.
pub fn pause(random: &mut Rng, mean_s: f64) -> f64 {
    -mean_s * (1.0 - random.f64()).ln()
}

impl Maker {
    /// For a fleet of so many engines.
    pub fn new(load: Load, engines: usize) -> Self {
        let shape = load.shape();
        let beginnings = ((shape.beginnings * engines as f64) as u32).max(2);
        Self { shape, beginnings, fresh: beginnings * shape.beginning }
    }

    /// So many blocks that nobody has seen.
    fn fresh(&mut self, blocks: u32) -> std::ops::Range<u32> {
        self.fresh += blocks;
        self.fresh - blocks..self.fresh
    }

    /// A new session. Some beginnings are asked for more often than others.
    pub fn begin(&mut self, random: &mut Rng) -> Session {
        let mut random = random.fork();
        let popular = random.f64() * random.f64();
        let which = (popular * f64::from(self.beginnings)) as u32;
        let mut prompt: Vec<u32> = (which * self.shape.beginning..(which + 1) * self.shape.beginning).collect();
        prompt.extend(self.fresh(between(&mut random, self.shape.first)));
        let left = between(&mut random, self.shape.turns) - 1;
        let answer = between(&mut random, self.shape.answer);
        Session { prompt, answer, said: self.fresh(answer / BLOCK).collect(), left, random }
    }

    /// The session's next turn, after its answer.
    pub fn go_on(&mut self, session: &mut Session) {
        session.prompt.append(&mut session.said);
        session.prompt.extend(self.fresh(between(&mut session.random, self.shape.turn).max(1)));
        session.answer = between(&mut session.random, self.shape.answer);
        session.said = self.fresh(session.answer / BLOCK).collect();
        session.left -= 1;
    }
}
