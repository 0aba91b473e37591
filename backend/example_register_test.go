package backend_test

import (
	"context"
	"fmt"
	"net/url"

	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
)

// The package of a driver registers its schemes when a program imports it.
func init() {
	backend.Register("tiny", []string{"tiny"}, open)
}

// open opens tiny://, a store in memory for ten keys.
func open(_ context.Context, u *url.URL) (quota.Store, error) {
	if u.RawQuery != "" {
		return nil, fmt.Errorf("tiny: %w: the URL has parameters; accepted: tiny://", quota.ErrInvalid)
	}
	return local.NewWithOptions(local.Options{MaxKeys: 10})
}

func ExampleRegister() {
	store, err := backend.Open(context.Background(), "tiny://")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer store.Close()

	_, err = backend.Open(context.Background(), "tiny://?max_keys=20")
	fmt.Println(err)
	// Output:
	// backend: open tiny: tiny: invalid request: the URL has parameters; accepted: tiny://
}
