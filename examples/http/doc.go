// Package http holds programs with the middleware of quotahttp: rest, beside the same API with two other libraries, and the
// adapters for other routers, as tests.
package http
