//! The Envoy front end: an endpoint picker behind the filter `ext_proc`.
//!
//! One stream is one request. In `FULL_DUPLEX_STREAMED` the answer to the headers is withheld until
//! the body is complete; in `BUFFERED` Envoy waits for it before it sends the body. Either way the
//! engine's address goes out as a header and as metadata of `envoy.lb`. A stream that ends early is
//! a client that went away: what was booked for it is given back.

mod metadata;
mod session;

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::service::ext_proc::v3::external_processor_server::{
    ExternalProcessor, ExternalProcessorServer,
};
use envoy_types::pb::envoy::service::ext_proc::v3::{ProcessingRequest, ProcessingResponse};
use futures_util::stream::{self, Stream};
use tonic::{Request, Response, Status, Streaming};

use super::router::Router;
use session::PickerSession;

/// Bounds and options of the picker.
#[derive(Debug, Clone)]
pub struct PickerLimits {
    /// Bytes of a request's body.
    pub body_bytes_max: usize,
    /// Engines beside the chosen one in the header that names it.
    pub fallbacks: usize,
    /// Header that names a session, in lower case.
    pub session_header: String,
}

/// How long Envoy may go on sending after a refusal.
const DRAIN: Duration = Duration::from_secs(10);

/// The service.
#[derive(Debug)]
pub struct Picker {
    router: Arc<Router>,
    limits: Arc<PickerLimits>,
}

/// The picker as a gRPC service.
pub fn service(router: Arc<Router>, limits: PickerLimits) -> ExternalProcessorServer<Picker> {
    // Room for a body over the limit, so that it is refused by name; a gateway that buffers more
    // has its own limit.
    let most = limits.body_bytes_max.saturating_mul(2).saturating_add(32 << 20);
    let picker = Picker { router, limits: Arc::new(limits) };
    ExternalProcessorServer::new(picker).max_decoding_message_size(most).max_encoding_message_size(most)
}

type PickerAnswers = Pin<Box<dyn Stream<Item = Result<ProcessingResponse, Status>> + Send>>;

#[tonic::async_trait]
impl ExternalProcessor for Picker {
    type ProcessStream = PickerAnswers;

    async fn process(&self, request: Request<Streaming<ProcessingRequest>>) -> Result<Response<PickerAnswers>, Status> {
        let session = PickerSession::new(Arc::clone(&self.router), Arc::clone(&self.limits));
        let conversation = PickerConversation { messages: request.into_inner(), session, answers: VecDeque::new() };
        let answers = stream::unfold(conversation, |mut conversation| async move {
            let answer = conversation.next().await?;
            Some((Ok(answer), conversation))
        });
        Ok(Response::new(Box::pin(answers)))
    }
}

/// Envoy's messages about one request, and what it has not taken yet of the answers. It runs where
/// its answers are sent: a task of its own would cost each message a change of thread, which takes
/// longer than most decisions.
struct PickerConversation {
    messages: Streaming<ProcessingRequest>,
    session: PickerSession,
    answers: VecDeque<ProcessingResponse>,
}

impl PickerConversation {
    /// The next answer; `None` when there will be none.
    async fn next(&mut self) -> Option<ProcessingResponse> {
        loop {
            if let Some(answer) = self.answers.pop_front() {
                return Some(answer);
            }
            if self.session.is_over() {
                // Hanging up with a body on its way could overtake the refusal: the rest is read
                // and dropped until Envoy hangs up.
                let rest = async { while let Ok(Some(_)) = self.messages.message().await {} };
                let _hung_up = tokio::time::timeout(DRAIN, rest).await;
                return None;
            }
            // An error here is Envoy hanging up.
            let message = self.messages.message().await.ok().flatten()?;
            self.answers.extend(self.session.take(message).await);
        }
    }
}
