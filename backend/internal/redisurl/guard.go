package redisurl

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/quota"
)

// Guard returns a client whose errors do not name the user of the URL. If the server is part of a cluster and
// the URL is not for one, its errors say so.
func (c *Config) Guard(client engine.Client) engine.Client { return &guard{client, c} }

type guard struct {
	engine.Client
	c *Config
}

func (g *guard) Do(ctx context.Context, args []any, keys int) (engine.Reply, error) {
	r, err := g.Client.Do(ctx, args, keys)
	if err != nil {
		err = g.explain(err)
	}
	return r, err
}

// DoAll sends scripts together, see engine.Bundler.
func (g *guard) DoAll(ctx context.Context, scripts [][]any) (replies []engine.Reply, err error) {
	if b, ok := g.Client.(engine.Bundler); ok {
		replies, err = b.DoAll(ctx, scripts)
	} else {
		err = fmt.Errorf("redis: %w: the client sends no scripts together", quota.ErrMisconfigured)
	}
	if err != nil {
		err = g.explain(err)
	}
	return replies, err
}

func (g *guard) Info(ctx context.Context) ([]string, error) {
	infos, err := g.Client.Info(ctx)
	if err != nil {
		err = g.explain(err)
	}
	return infos, err
}

// Node returns the address of the node that has a slot, see engine.Placer.
func (g *guard) Node(slot uint16) string {
	if p, ok := g.Client.(engine.Placer); ok {
		return p.Node(slot)
	}
	return ""
}

// Warm makes a node ready, see engine.Warmer.
func (g *guard) Warm(ctx context.Context, node, key string) error {
	w, ok := g.Client.(engine.Warmer)
	if !ok {
		return nil
	}
	err := w.Warm(ctx, node, key)
	if err != nil {
		err = g.explain(err)
	}
	return err
}

// Ping makes a round trip to a node, see engine.Warmer.
func (g *guard) Ping(ctx context.Context, node, key string) error {
	if w, ok := g.Client.(engine.Warmer); ok {
		return w.Ping(ctx, node, key)
	}
	return nil
}

// Refresh learns anew which node has which slots.
func (g *guard) Refresh(ctx context.Context) error {
	p, ok := g.Client.(engine.Placer)
	if !ok {
		return nil
	}
	err := p.Refresh(ctx)
	if err != nil {
		err = g.explain(err)
	}
	return err
}

// Scan asks a node for some of its keys, see engine.Scanner.
func (g *guard) Scan(ctx context.Context, node, key string, scan []string) (got engine.Scanned, err error) {
	if s, ok := g.Client.(engine.Scanner); ok {
		got, err = s.Scan(ctx, node, key, scan)
	} else {
		err = fmt.Errorf("redis: %w: the client lists no keys", errors.ErrUnsupported)
	}
	if err != nil {
		err = g.explain(err)
	}
	return got, err
}

func (g *guard) explain(err error) error {
	text := err.Error()
	switch {
	case errors.Is(err, quota.ErrUnavailable) && !g.c.Cluster && strings.Contains(text, ": MOVED "):
		return fmt.Errorf("redis: %w: the server is part of a cluster; accepted for it: redis+cluster://", quota.ErrMisconfigured)
	case errors.Is(err, quota.ErrMisconfigured):
		for _, name := range [...]string{g.c.Username, g.c.SentinelUsername} {
			if full := "User " + name + " "; name != "" && strings.Contains(text, full) {
				text = strings.ReplaceAll(text, full, "the user ")
				some, _ := errors.AsType[engine.KeysError](err)
				unknown := errors.Is(err, quota.ErrIndeterminate)
				if err = error(&anonymous{text, unknown}); some.Err != nil {
					err = engine.KeysError{Err: err}
				}
			}
		}
	}
	return err
}

// anonymous is an ErrMisconfigured, and an ErrIndeterminate if the call may have been charged. It does not unwrap
// the client's error, which names the user.
type anonymous struct {
	text    string
	unknown bool
}

func (a *anonymous) Error() string { return a.text }

func (a *anonymous) Unwrap() []error {
	if a.unknown {
		return []error{quota.ErrIndeterminate, quota.ErrMisconfigured}
	}
	return []error{quota.ErrMisconfigured}
}
