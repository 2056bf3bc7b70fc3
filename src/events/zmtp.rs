//! One connection of `ZeroMQ`'s wire protocol, ZMTP 3 (<https://rfc.zeromq.org/spec/23/>), as far
//! as one who receives needs it: greeting, handshake without authentication, frames.
//!
//! The other side is not trusted. A frame or a message that is announced as larger than a batch can
//! be ends the connection before anything of it is kept, and memory grows only with bytes that have
//! come. That is why this is not the library that publishes: it takes any announced length, and
//! makes room for it at once.

use std::io;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use crate::limits;

const GREETING_BYTES: usize = 64;
const MECHANISM: &[u8] = b"NULL";

const MORE: u8 = 1;
const LONG: u8 = 2;
const COMMAND: u8 = 4;

/// What this side is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SocketRole {
    /// It receives what a publisher sends to all.
    Subscriber,
    /// It asks, and receives answers.
    Dealer,
}

impl SocketRole {
    fn name(self) -> &'static [u8] {
        match self {
            Self::Subscriber => b"SUB",
            Self::Dealer => b"DEALER",
        }
    }

    fn goes_with(self, other: &[u8]) -> bool {
        match self {
            Self::Subscriber => [b"PUB".as_slice(), b"XPUB"].contains(&other),
            Self::Dealer => [b"ROUTER".as_slice(), b"DEALER", b"REP"].contains(&other),
        }
    }
}

/// Why a connection cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum LineFault {
    /// The connection has ended, or was never made.
    #[error("the connection ended: {0}")]
    Io(#[from] io::Error),
    /// The other side takes too long to say who it is.
    #[error("no handshake within {} ms", limits::HANDSHAKE_MS)]
    Late,
    /// It is no publisher of ours.
    #[error("it does not speak ZMTP 3: {0}")]
    Foreign(&'static str),
    /// More is announced than a batch can be.
    #[error("a message of {0} bytes is announced, of at most {max}", max = limits::MESSAGE_BYTES_MAX)]
    TooLarge(u64),
    /// A message of too many frames.
    #[error("a message has more than {} frames", limits::FRAMES_MAX)]
    TooMany,
}

impl LineFault {
    /// The other side did something that no publisher does; ends of connections are ordinary.
    pub fn is_breach(&self) -> bool {
        !matches!(self, Self::Io(_))
    }
}

/// What bytes travel over.
pub(super) trait Transport: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Transport for T {}

/// A connection after its handshake.
pub(super) struct PublisherLine {
    line: Box<dyn Transport>,
    frames: Frames,
}

impl PublisherLine {
    /// Shakes hands. A subscriber asks for everything.
    ///
    /// # Errors
    /// [`LineFault`], after [`limits::HANDSHAKE_MS`] at the latest.
    pub(super) async fn open(line: Box<dyn Transport>, role: SocketRole) -> Result<Self, LineFault> {
        let mut connection = Self { line, frames: Frames::default() };
        timeout(Duration::from_millis(limits::HANDSHAKE_MS), connection.shake_hands(role))
            .await
            .map_err(|_| LineFault::Late)??;
        Ok(connection)
    }

    async fn shake_hands(&mut self, role: SocketRole) -> Result<(), LineFault> {
        let mut greeting = [0; GREETING_BYTES];
        (greeting[0], greeting[9], greeting[10]) = (0xff, 0x7f, 3);
        greeting[12..12 + MECHANISM.len()].copy_from_slice(MECHANISM);
        self.line.write_all(&greeting).await?;
        let mut theirs = [0; GREETING_BYTES];
        self.line.read_exact(&mut theirs).await?;
        check_greeting(&theirs)?;
        self.line.write_all(&ready(role)).await?;
        let Frame::Command(command) = self.frame().await? else {
            return Err(LineFault::Foreign("it sends messages before it is ready"));
        };
        let other = socket_type(&command)?;
        if !role.goes_with(&other) {
            return Err(LineFault::Foreign("its socket is of another kind: is that the right port?"));
        }
        if role == SocketRole::Subscriber {
            self.send(&[&[1]]).await?;
        }
        Ok(())
    }

    /// Sends a message of these short frames.
    ///
    /// # Errors
    /// [`LineFault::Io`].
    pub(super) async fn send(&mut self, frames: &[&[u8]]) -> Result<(), LineFault> {
        let mut out = Vec::new();
        for (at, frame) in frames.iter().enumerate() {
            let more = if at + 1 < frames.len() { MORE } else { 0 };
            push_short(&mut out, more, frame);
        }
        Ok(self.line.write_all(&out).await?)
    }

    /// The next message. Nothing is lost where the future is dropped before its end.
    ///
    /// # Errors
    /// [`LineFault`]: the connection is of no use any more.
    pub(super) async fn message(&mut self) -> Result<Vec<Bytes>, LineFault> {
        loop {
            match self.frame().await? {
                Frame::Message(frames) => return Ok(frames),
                Frame::Command(command) => {
                    if let Some(pong) = pong(&command) {
                        self.line.write_all(&pong).await?;
                    }
                }
            }
        }
    }

    async fn frame(&mut self) -> Result<Frame, LineFault> {
        loop {
            if let Some(frame) = self.frames.next()? {
                return Ok(frame);
            }
            self.frames.buffer.reserve(limits::READ_BYTES);
            if self.line.read_buf(&mut self.frames.buffer).await? == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
        }
    }
}

/// What was received, put together.
enum Frame {
    Command(Bytes),
    Message(Vec<Bytes>),
}

/// Bytes on their way to be messages.
#[derive(Default)]
struct Frames {
    buffer: BytesMut,
    message: Vec<Bytes>,
    message_bytes: u64,
}

impl Frames {
    /// So many bytes that have come. Short ones are copied: one that is kept must not keep the
    /// whole buffer.
    fn body(&mut self, bytes: usize) -> Bytes {
        if bytes >= limits::READ_BYTES {
            return self.buffer.split_to(bytes).freeze();
        }
        let body = Bytes::copy_from_slice(&self.buffer[..bytes]);
        self.buffer.advance(bytes);
        body
    }

    /// The next command or whole message that has come.
    fn next(&mut self) -> Result<Option<Frame>, LineFault> {
        while let Some((flags, head, bytes)) = head(&self.buffer)? {
            let of_message = if flags & COMMAND == 0 { self.message_bytes } else { 0 };
            let all = of_message.saturating_add(bytes);
            if all > limits::MESSAGE_BYTES_MAX {
                return Err(LineFault::TooLarge(all));
            }
            if self.buffer.len() < head + bytes as usize {
                return Ok(None);
            }
            self.buffer.advance(head);
            let body = self.body(bytes as usize);
            if flags & COMMAND != 0 {
                return Ok(Some(Frame::Command(body)));
            }
            if self.message.len() == limits::FRAMES_MAX {
                return Err(LineFault::TooMany);
            }
            self.message.push(body);
            self.message_bytes = all;
            if flags & MORE == 0 {
                self.message_bytes = 0;
                return Ok(Some(Frame::Message(std::mem::take(&mut self.message))));
            }
        }
        Ok(None)
    }
}

/// Flags, bytes of the head itself, and bytes that follow it.
fn head(buffer: &[u8]) -> Result<Option<(u8, usize, u64)>, LineFault> {
    let Some((&flags, rest)) = buffer.split_first() else { return Ok(None) };
    if flags & !(MORE | LONG | COMMAND) != 0 || flags & COMMAND != 0 && flags & MORE != 0 {
        return Err(LineFault::Foreign("a frame has flags that there are not"));
    }
    if flags & LONG == 0 {
        return Ok(rest.first().map(|bytes| (flags, 2, u64::from(*bytes))));
    }
    Ok(rest.first_chunk().map(|bytes| (flags, 9, u64::from_be_bytes(*bytes))))
}

fn check_greeting(greeting: &[u8; GREETING_BYTES]) -> Result<(), LineFault> {
    if greeting[0] != 0xff || greeting[9] & 1 == 0 {
        return Err(LineFault::Foreign("its greeting is another one"));
    }
    if greeting[10] < 3 {
        return Err(LineFault::Foreign("its ZeroMQ is older than 4.0"));
    }
    let mechanism = &greeting[12..32];
    let is_ours = mechanism.strip_prefix(MECHANISM).is_some_and(|rest| rest.iter().all(|byte| *byte == 0));
    if is_ours { Ok(()) } else { Err(LineFault::Foreign("it asks for authentication")) }
}

fn push_short(out: &mut Vec<u8>, flags: u8, body: &[u8]) {
    debug_assert!(u8::try_from(body.len()).is_ok(), "what this side sends is short");
    out.extend([flags, body.len() as u8]);
    out.extend(body);
}

fn ready(role: SocketRole) -> Vec<u8> {
    let (name, value) = (b"Socket-Type", role.name());
    let mut body = b"\x05READY".to_vec();
    body.push(name.len() as u8);
    body.extend(name);
    body.extend((value.len() as u32).to_be_bytes());
    body.extend(value);
    let mut out = Vec::new();
    push_short(&mut out, COMMAND, &body);
    out
}

/// The kind of socket that a READY names.
fn socket_type(command: &Bytes) -> Result<Bytes, LineFault> {
    const CUT: LineFault = LineFault::Foreign("its handshake is cut short");
    let mut rest = command.clone();
    let mut take = |bytes: usize| {
        if rest.len() < bytes { None } else { Some(rest.split_to(bytes)) }
    };
    let text = |take: &mut dyn FnMut(usize) -> Option<Bytes>| {
        let bytes = take(1)?[0];
        take(bytes.into())
    };
    match text(&mut take).as_deref() {
        Some(b"READY") => {}
        Some(b"ERROR") => return Err(LineFault::Foreign("it refuses the handshake")),
        _ => return Err(LineFault::Foreign("its handshake is another one")),
    }
    loop {
        let name = text(&mut take).ok_or(CUT)?;
        let bytes = take(4).ok_or(CUT)?.get_u32();
        let value = take(bytes as usize).ok_or(CUT)?;
        if name.eq_ignore_ascii_case(b"Socket-Type") {
            return Ok(value);
        }
    }
}

/// The answer to a PING, which carries what the PING did.
fn pong(command: &Bytes) -> Option<Vec<u8>> {
    let context = command.strip_prefix(b"\x04PING")?.get(2..)?;
    let mut body = b"\x04PONG".to_vec();
    // The protocol allows sixteen bytes.
    body.extend(&context[..context.len().min(16)]);
    let mut out = Vec::new();
    push_short(&mut out, COMMAND, &body);
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn next(frames: &mut Frames, bytes: &[u8]) -> Result<Option<Vec<Bytes>>, LineFault> {
        frames.buffer.extend_from_slice(bytes);
        Ok(frames.next()?.map(|frame| match frame {
            Frame::Message(parts) => parts,
            Frame::Command(body) => vec![body],
        }))
    }

    #[test]
    fn messages_are_put_together_however_their_bytes_come() {
        let mut wire = vec![MORE, 1, b'a', LONG];
        wire.extend(300_u64.to_be_bytes());
        wire.extend([7; 300]);
        wire.extend([0, 0]);
        for cut in 1..=wire.len() {
            let mut frames = Frames::default();
            let mut messages = Vec::new();
            for part in wire.chunks(cut) {
                let mut found = next(&mut frames, part).expect("it is well formed");
                while let Some(message) = found {
                    messages.push(message);
                    found = next(&mut frames, b"").expect("it is well formed");
                }
            }
            let lens: Vec<Vec<usize>> = messages.iter().map(|it| it.iter().map(Bytes::len).collect()).collect();
            assert_eq!(lens, [vec![1, 300], vec![0]], "in pieces of {cut}");
        }
    }

    #[test]
    fn what_is_announced_as_too_large_is_refused_before_it_comes() {
        for bytes in [limits::MESSAGE_BYTES_MAX + 1, 4 << 30, u64::MAX] {
            let mut frames = Frames::default();
            let mut wire = vec![LONG];
            wire.extend(bytes.to_be_bytes());
            assert!(matches!(next(&mut frames, &wire), Err(LineFault::TooLarge(all)) if all == bytes));
            // Nor in pieces.
            let mut frames = Frames::default();
            assert!(next(&mut frames, &[MORE, 1, 0]).expect("a short one").is_none());
            let mut rest = vec![LONG | MORE];
            rest.extend(limits::MESSAGE_BYTES_MAX.to_be_bytes());
            assert!(matches!(next(&mut frames, &rest), Err(LineFault::TooLarge(_))));
        }
        let mut frames = Frames::default();
        let wire: Vec<u8> = [MORE, 0].repeat(limits::FRAMES_MAX + 1);
        assert!(matches!(next(&mut frames, &wire), Err(LineFault::TooMany)));
        assert!(matches!(next(&mut Frames::default(), &[0x80, 0]), Err(LineFault::Foreign(_))));
    }

    #[test]
    fn handshakes_are_read() {
        let body = |role| Bytes::from(ready(role)).split_off(2);
        assert_eq!(socket_type(&body(SocketRole::Dealer)).expect("ready"), "DEALER");
        for cut in 0..body(SocketRole::Dealer).len() {
            assert!(socket_type(&body(SocketRole::Dealer).slice(..cut)).is_err(), "cut at {cut}");
        }
        let refused = socket_type(&Bytes::from_static(b"\x05ERROR\x02no")).expect_err("no").to_string();
        assert!(refused.contains("refuses"), "{refused}");
        assert_eq!(pong(&Bytes::from_static(b"\x04PING\0\x01ctx")), Some(b"\x04\x08\x04PONGctx".to_vec()));
        assert_eq!(pong(&Bytes::from_static(b"\x04PONGctx")), None);
    }

    #[test]
    fn greetings_of_others_are_refused() {
        let mut greeting = [0; GREETING_BYTES];
        (greeting[0], greeting[9], greeting[10]) = (0xff, 0x7f, 3);
        greeting[12..16].copy_from_slice(b"NULL");
        assert!(check_greeting(&greeting).is_ok());
        for (at, byte, said) in
            [(0, b'H', "greeting"), (10, 1, "older"), (12, b'C', "authentication"), (16, b'X', "authentication")]
        {
            let mut other = greeting;
            other[at] = byte;
            assert!(check_greeting(&other).expect_err("another one").to_string().contains(said));
        }
    }
}
