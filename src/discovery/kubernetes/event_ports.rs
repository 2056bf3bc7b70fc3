//! Where engines of a pool publish and replay their events.

use kvcellar_block::error::{Error, Result};

/// Ports of rank 0 for its events. A rank's ports are these plus its
/// number, as vLLM counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct EventPorts {
    /// Rank 0 publishes here.
    events: u16,
    /// Rank 0 replays here. `None`: nobody does.
    replay: Option<u16>,
}

/// The flag that gives these ports.
const FLAG: &str = "inference-pool-events";

impl EventPorts {
    /// Reads the flag.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let (events, replay) = text.split_once(':').map_or((text, None), |(events, replay)| (events, Some(replay)));
        let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0);
        let wrong = || Error::config(FLAG, format!("`{text}` is no PORT[:REPLAY-PORT]"), "Write e.g. 5557:5657");
        let replay = replay.map(|text| port(text).ok_or_else(wrong)).transpose()?;
        Ok(Self { events: port(events).ok_or_else(wrong)?, replay })
    }

    /// The ports of a rank, of so many in the pool's pods.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub(crate) fn of_rank(self, rank: u32, ranks: u32) -> Result<(u16, Option<u16>)> {
        let wrong = |problem: String, remedy: &str| Error::config(FLAG, problem, remedy);
        if let Some(replay) = self.replay
            && ranks > 1
            && u32::from(replay.abs_diff(self.events)) < ranks
        {
            let problem =
                format!("{}:{replay} lie closer together than there are ranks in a pod, {ranks}", self.events);
            return Err(wrong(problem, "Start engines and this command with ports further apart, e.g. 5557:5657"));
        }
        let plus = |port: u16| {
            u32::from(port).checked_add(rank).and_then(|port| u16::try_from(port).ok()).ok_or_else(|| {
                wrong(format!("{port} and rank {rank} make no port"), "Write lower ports, e.g. 5557:5657")
            })
        };
        Ok((plus(self.events)?, self.replay.map(plus).transpose()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_add_their_number() {
        let ports = EventPorts::parse("5557:5657").expect("two ports");
        assert_eq!(ports.of_rank(0, 1).expect("ports"), (5557, Some(5657)));
        assert_eq!(ports.of_rank(9, 8).expect("ports"), (5566, Some(5666)));
        assert_eq!(EventPorts::parse("5557").expect("a port").of_rank(1, 2).expect("a port"), (5558, None));
    }

    #[test]
    fn ports_that_cannot_be_right_are_refused() {
        for wrong in ["", "x", "0", "1:", "1:2:3", "70000"] {
            let error = EventPorts::parse(wrong).expect_err(wrong).to_string();
            assert!(error.contains(FLAG) && error.contains("5557:5657"), "{error}");
        }
        let of_two = |text: &str| EventPorts::parse(text).expect("ports").of_rank(1, 2);
        assert!(of_two("5557:5559").is_ok());
        for wrong in ["5557:5558", "5558:5557"] {
            let error = of_two(wrong).expect_err(wrong).to_string();
            assert!(error.contains("ranks in a pod, 2") && error.contains("further apart"), "{error}");
        }
        let error = of_two("65535").expect_err("no port").to_string();
        assert!(error.contains("65535 and rank 1"), "{error}");
    }
}
