//! The Envoy front end: an endpoint picker behind the filter `ext_proc`.
//!
//! One stream is one request. In `FULL_DUPLEX_STREAMED` the answer to the headers is withheld until
//! the body is complete; in `BUFFERED` Envoy waits for it before it sends the body. Either way the
//! engine's address goes out as a header and as metadata of `envoy.lb`. A stream that ends early is
//! a client that went away: what was booked for it is given back.

mod session;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::service::ext_proc::v3::external_processor_server::{
    ExternalProcessor, ExternalProcessorServer,
};
use envoy_types::pb::envoy::service::ext_proc::v3::{ProcessingRequest, ProcessingResponse};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
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

/// Answers that may wait for Envoy to take them.
const ANSWERS: usize = 64;

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
        let mut messages = request.into_inner();
        let (sender, receiver) = mpsc::channel(ANSWERS);
        let mut session = PickerSession::new(Arc::clone(&self.router), Arc::clone(&self.limits));
        tokio::spawn(async move {
            // An error here is Envoy hanging up.
            while let Ok(Some(message)) = messages.message().await {
                for answer in session.take(message).await {
                    if sender.send(Ok(answer)).await.is_err() {
                        return;
                    }
                }
                if session.is_over() {
                    // Hanging up with a body on its way could overtake the refusal: the rest is
                    // read and dropped until Envoy hangs up.
                    let rest = async { while let Ok(Some(_)) = messages.message().await {} };
                    let _hung_up = tokio::time::timeout(DRAIN, rest).await;
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}
