// Package quotahttp puts limits on net/http: a middleware that charges each request before its handler runs,
// and answers 429 where a limit denies it, and a transport for clients that behave.
//
//	minute, err := algorithm.ParseLimit("minute: 100/1m sliding")
//	if err != nil {
//		return err
//	}
//	limits, err := quotahttp.New(limiter, nil, quotahttp.By(quotahttp.IP(quotahttp.Peer), minute))
//	if err != nil {
//		return err
//	}
//	return http.ListenAndServe(":8080", limits(mux))
//
// The result of [New] is the func(http.Handler) http.Handler that chi and others take. All charges of a
// request are one list, see [quota.Limiter.ChargeAll]: a request that one limit denies is charged to none.
//
// # Rules and keys
//
// A [Rule] makes the charges of a request, and a [Key] names their owner. [By] makes the usual rule. A
// program's own function is a rule too. Where a key is not found the request has no owner: that is an error,
// [ErrNoKey], and never one quota for all such requests.
//
// The address of a client is found by an [Address], which the program must choose, since any client can send
// a header such as X-Forwarded-For: [Peer], [Proxies], [ProxyCount] or [AddressHeader].
//
// # Answers
//
//	denied                            429, Retry-After rounded up to a second unless the request can never fit
//	the store failed                  503 and Retry-After, or the handler runs, see Options.FailOpen
//	no key, or charges not valid      500
//	the client left meanwhile         none; status 499 for logs
//
// Bodies are problem+json of RFC 9457, see [Refusal]. [Headers] chooses the fields that tell clients of their
// limits, on every answer; those of draft-ietf-httpapi-ratelimit-headers-11 are the default. Two charges to
// limits of one name count as the tighter of the two. Not told are shadows, limits of 10^15 tokens or more,
// and decisions on a process's share while the store is down, which are not the fleet's numbers. A request
// with an Origin gets Access-Control-Expose-Headers as well. A middleware for CORS belongs around this one:
// it answers preflights, and marks refusals so that a browser's script may read them. Here OPTIONS is a
// request as any other.
//
// # After the answer
//
// A charge may be an estimate. The handler gives the actual cost by [From] and [Receipt.Settle], or
// Options.Settle reads it in the answer. When the handler is over, also by a panic or because its client
// left, all corrections are made in one call, which outlives the request's context. Without an actual cost
// the estimate stays charged.
//
// # Clients
//
// [NewTransport] is the other side: it waits for quota before it sends a request, and holds off a whole fleet
// as long as a server says. Where a limit has holds, such as that of the streams that all processes have open at a server, a
// request holds its charges until its answer is over.
//
// # Concurrency
//
// All functions may be called concurrently.
package quotahttp
