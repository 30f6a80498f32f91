//! Requests in and errors out: every error, also of a call that reaches no handler, has the one shape and a hint.

use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use commonage_nodemgr_api::error::{ApiError, Code, ErrorBody};
use commonage_nodemgr_api::http::MAX_BODY;
use http_body_util::BodyExt as _;
use serde::de::DeserializeOwned;

/// How long a body may take.
const BODY_WAIT: Duration = Duration::from_secs(30);
/// How much of a body that is too long is read and thrown away, bytes: a client that writes its whole request first then reads why.
const DRAIN: usize = 16 * MAX_BODY;

/// An error on its way out.
#[derive(Debug)]
pub struct Failure(pub ApiError);

impl From<ApiError> for Failure {
    fn from(e: ApiError) -> Self {
        Self(e)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let hint = self.0.hint.clone().or_else(|| Some("see the error's message".to_owned()));
        (status, Json(ErrorBody { error: ApiError { hint, ..self.0 } })).into_response()
    }
}

/// A JSON body of at most [`MAX_BODY`] bytes, whatever its content type says.
#[derive(Debug)]
pub struct JsonBody<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for JsonBody<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, _: &S) -> Result<Self, Failure> {
        let read = tokio::time::timeout(BODY_WAIT, read(request.into_body()));
        let late = |_| {
            ApiError::new(Code::Invalid, format!("the body did not arrive within {} s", BODY_WAIT.as_secs()))
                .hint("send the whole body at once, with its true Content-Length")
        };
        let bytes = read.await.map_err(late)??;
        serde_json::from_slice(&bytes).map(Self).map_err(|e| {
            let what = if bytes.is_empty() {
                "the body is empty".to_owned()
            } else {
                format!("the body is not what this call takes: {e}")
            };
            Failure(
                ApiError::new(Code::Invalid, what)
                    .hint("send one JSON object with exactly this call's fields"),
            )
        })
    }
}

async fn read(mut body: Body) -> Result<Vec<u8>, ApiError> {
    let mut bytes = Vec::new();
    let mut seen = 0usize;
    while let Some(frame) = body.frame().await {
        let broken = |e| {
            ApiError::new(Code::Invalid, format!("the body broke off: {e}")).hint("send the request again")
        };
        let Ok(data) = frame.map_err(broken)?.into_data() else { continue };
        seen = seen.saturating_add(data.len());
        if seen <= MAX_BODY {
            bytes.extend_from_slice(&data);
        } else if seen > DRAIN {
            break;
        }
    }
    if seen > MAX_BODY {
        return Err(ApiError::new(Code::TooLarge, format!("the body is longer than {MAX_BODY} bytes"))
            .hint("keep large files out of the configuration: have the boot script fetch them"));
    }
    Ok(bytes)
}

/// The one parameter of a path, checked.
#[derive(Debug)]
pub struct Param<T>(pub T);

impl<T, S> FromRequestParts<S> for Param<T>
where
    T: std::str::FromStr<Err: std::fmt::Display>,
    S: Send + Sync,
{
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failure> {
        let invalid =
            |e: String| Failure(ApiError::new(Code::Invalid, e).hint("correct the path of the request"));
        let Path(text) =
            Path::<String>::from_request_parts(parts, state).await.map_err(|e| invalid(e.to_string()))?;
        text.parse().map(Param).map_err(|e: T::Err| invalid(e.to_string()))
    }
}

/// What a path that is no call's gets.
pub async fn no_such_call(request: Request) -> Response {
    let shown: String = request.uri().path().chars().take(80).collect();
    let e = ApiError::new(Code::NotFound, format!("there is no call {} {shown}", request.method()))
        .hint("the calls are: POST /v1/acquire, /v1/bind, /v1/release, /v1/renew; GET /v1/rcaps, /v1/rcaps/{rcap}, /v1/slivers, \
               /v1/node, /v1/network; PUT /v1/slivers/{slice}/config; DELETE /v1/slivers/{slice}; POST /v1/slivers/{slice}/exec; \
               GET /v1/slivers/{slice}/metrics");
    let mut response = Failure(e).into_response();
    // Its body was not read: the connection cannot be used again.
    response.headers_mut().insert(header::CONNECTION, header::HeaderValue::from_static("close"));
    response
}
