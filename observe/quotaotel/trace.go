package quotaotel

import (
	"context"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// Trace returns a store with a span around each call of Charge and ChargeAll: of the kind client, named fleetquota.charge, with
// the limit of the first charge, its operation, the number of charges, whether they were granted, the node where the store
// knows it, and error.type where the call failed. Put it directly around a store with servers, and policies and leases around it,
// so that their own decisions have no span. A store without servers (see [driver.HealthReporter]), such as one in memory, is
// returned as it is: its decisions are local. All else of the store stays as it is, see [driver.Wrapper].
func (t *Telemetry) Trace(store quota.Store) quota.Store {
	if _, ok := driver.Find[driver.HealthReporter](store); !ok {
		return store
	}
	s := &traced{Store: store, t: t}
	s.placed, _ = driver.Find[driver.Placed](store)
	return s
}

type traced struct {
	quota.Store
	t      *Telemetry
	placed driver.Placed // nil for a store of one node
}

// Unwrap returns the store inside.
func (s *traced) Unwrap() quota.Store { return s.Store }

func (s *traced) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	ctx, span := s.start(ctx, &c, 1)
	defer span.End()
	d, err := s.Store.Charge(ctx, c)
	end(ctx, span, d.Allowed || d.Shadow, err)
	return d, err
}

func (s *traced) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	var first quota.Charge
	if len(cs) > 0 {
		first = cs[0]
	}
	ctx, span := s.start(ctx, &first, len(cs))
	defer span.End()
	err := s.Store.ChargeAll(ctx, cs, out)
	end(ctx, span, err == nil && quota.Granted(out[:len(cs)]), err)
	return err
}

// start begins a span.
func (s *traced) start(ctx context.Context, c *quota.Charge, n int) (context.Context, trace.Span) {
	ctx, span := s.t.tracer.Start(ctx, "fleetquota.charge", trace.WithSpanKind(trace.SpanKindClient))
	if span.IsRecording() {
		span.SetAttributes(attribute.String("fleetquota.limit", s.t.limit(c.Limit).name), attribute.String("fleetquota.op", c.Op.String()), attribute.Int("fleetquota.charges", n))
		if s.placed != nil {
			if node := s.placed.Node(*c); node != "" {
				span.SetAttributes(attribute.String("fleetquota.node", node))
			}
		}
	}
	return ctx, span
}

// end notes the outcome of a call.
func end(ctx context.Context, span trace.Span, granted bool, err error) {
	if !span.IsRecording() {
		return
	}
	if err == nil {
		span.SetAttributes(attribute.Bool("fleetquota.granted", granted))
		return
	}
	class := driver.Class(err)
	span.SetAttributes(attribute.String("error.type", class))
	if ctx.Err() == nil { // a caller that left is no failure of the store
		span.SetStatus(codes.Error, class)
	}
}
